"""Run a frozen causal language model of transformers, from a local folder, in the student's job.

The ranks that share one student replica divide its microbatches among themselves and exchange the
final hidden states. The teacher's head is split over the student's tensor group, and targets are
made from both as from any other teacher's. Weights are whole on each rank, or spread over all ranks
by DeepSpeed's ZeRO-3.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_kd.config import ConfigError, RunConfig
from megatron_kd.data.batches import Microbatch
from megatron_kd.models.huggingface.transformers_model import load_causal_lm
from megatron_kd.models.transformer_config import DTYPES
from megatron_kd.parallel.collectives import all_gather, group_rank, group_size, raise_together
from megatron_kd.parallel.groups import Groups
from megatron_kd.parallel.vocab_shards import padded_vocab_size
from megatron_kd.targets import Target
from megatron_kd.targets.sample_keys import token_keys
from megatron_kd.teacher.runtime.targets import TargetMaker, configured_maker
from megatron_kd.teacher.source import CHECKPOINT_KEY, TeacherInputs
from megatron_kd.teacher.teacher import Teacher

# Largest difference of logits that counts as rounding, relative to the largest logit.
_ROUNDING = {"fp32": 1e-4, "bf16": 4e-2}


@dataclass(frozen=True)
class HuggingFaceSettings:
    """Hold how a Hugging Face teacher runs.

    Attributes:
        precision: of weights and activations, "bf16" or "fp32".
        vocab_size: true number of ids.
        rows: vocabulary rows of each tensor-parallel rank, as the student pads them.
        sequence_parallel: targets are made from this rank's slice of the sequence.
        zero3: spread the weights over all ranks.
        offload: keep the spread weights in CPU memory between uses.
    """

    precision: str
    vocab_size: int
    rows: int
    sequence_parallel: bool = False
    zero3: bool = False
    offload: bool = False


class HuggingFaceTeacher(Teacher):
    """Run AutoModelForCausalLM. Construction and `targets` are collective over the world.

    Raises:
        ConfigError: on every rank, if the model's logits are not its final hidden states times its
            head (soft caps, scaled logits, biases).
    """

    def __init__(
        self, folder: Path, groups: Groups, make_target: TargetMaker, settings: HuggingFaceSettings
    ) -> None:
        self.groups, self.settings, self.make_target = groups, settings, make_target
        shared = groups.tensor_size * groups.pipeline_size
        self._replica = groups.collection.mp if shared > 1 else None
        self._dtype = DTYPES[settings.precision]
        self.model: Any = self._load(folder).requires_grad_(False).eval()
        self.head = self._take_head()

    def _load(self, folder: Path) -> torch.nn.Module:
        if self.settings.zero3:
            return _load_spread(folder, self._dtype, self.groups, self.settings.offload)
        model, problem = None, None
        try:
            model = load_causal_lm(folder, self._dtype, setting=CHECKPOINT_KEY)
            model = model.to(self.groups.platform.device)
        except ConfigError as error:
            problem = str(error)
        raise_together(problem, ConfigError)
        assert model is not None
        return model

    @torch.no_grad()
    def targets(
        self, microbatches: Sequence[Microbatch], *, step: int | None = None
    ) -> list[Target | None]:
        """See Teacher.

        Collectives:
            One all-gather of hidden states over the replica's ranks for as many microbatches as it
            has ranks.
        """
        size, rank = group_size(self._replica), group_rank(self._replica)
        targets: list[Target | None] = []
        for start in range(0, len(microbatches), size):
            group = microbatches[start : start + size]
            # ZeRO-3 needs every rank to run equally often: surplus ranks repeat the last one.
            hidden = self._hidden(group[min(rank, len(group) - 1)].tokens)
            gathered = all_gather(hidden, self._replica)
            for states, microbatch in zip(gathered, group, strict=False):
                is_last = self.groups.is_last_stage
                targets.append(self._target(states, microbatch) if is_last else None)
        return targets

    def _hidden(self, tokens: Tensor) -> Tensor:
        """Return final hidden states [S, B, H] of tokens [B, S]: the head returns its input."""
        hidden: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return hidden.transpose(0, 1).to(self._dtype).contiguous()

    def _target(self, hidden: Tensor, microbatch: Microbatch) -> Target:
        length = hidden.shape[0]
        if self.settings.sequence_parallel:
            hidden = hidden.chunk(self.groups.tensor_size)[self.groups.tensor_rank].contiguous()
        return self.make_target(hidden, self.head, token_keys(microbatch.sample_keys, length))

    @torch.no_grad()
    def _take_head(self) -> Tensor:
        """Return [rows, H], this tensor rank's rows of the head, zero past the vocabulary.

        The model's own head then returns the hidden states that it gets.
        """
        head = self.model.get_output_embeddings()
        weight: Tensor | None = getattr(head, "weight", None)
        problem = None
        if weight is None or getattr(head, "bias", None) is not None:
            problem = (
                f"{CHECKPOINT_KEY}: the teacher's head is not one matrix without bias, which "
                "targets are made from: convert or choose another"
            )
        raise_together(problem, ConfigError)
        assert weight is not None
        rows = self.settings.rows
        start = rows * self.groups.tensor_rank
        valid = max(0, min(rows, self.settings.vocab_size - start))
        with _gathered(weight):
            local = torch.zeros(
                rows, weight.shape[1], dtype=self._dtype, device=self.groups.platform.device
            )
            local[:valid] = weight[start : start + valid].to(local)
        self._replace_head(local[:valid], start)
        return local

    def _replace_head(self, rows: Tensor, start: int) -> None:
        """Make the model return hidden states, and check that hidden @ head^T equals its logits.

        Args:
            rows: [n, H], this rank's valid rows of the head.
            start: id of the first row.

        Raises:
            ConfigError: on every rank, if the logits differ by more than rounding.
        """
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.settings.vocab_size, (1, 16), generator=generator)
        tokens = tokens.to(rows.device)
        expected = self.model(input_ids=tokens, use_cache=False).logits[0].float()
        self.model.set_output_embeddings(_ReturnInput())
        logits = self._hidden(tokens)[:, 0].float() @ rows.float().T
        expected = expected[:, start : start + len(rows)]
        difference = float((logits - expected).abs().max()) if len(rows) else 0.0
        scale = float(expected.abs().max()) if len(rows) else 0.0
        problem = None
        if not difference <= _ROUNDING[self.settings.precision] * max(1.0, scale):
            problem = (
                f"{CHECKPOINT_KEY}: the teacher's logits are not its final hidden states times its "
                f"head (a soft cap, scaled logits or the like; they differ by {difference:.3g}): "
                "such a model cannot be a teacher here"
            )
        raise_together(problem, ConfigError)


class _ReturnInput(torch.nn.Module):
    """Replace the head, and return its input."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


@contextlib.contextmanager
def _gathered(weight: Tensor) -> Iterator[None]:
    """Make a parameter whole on every rank inside `with`, also where ZeRO-3 has spread it."""
    if not hasattr(weight, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        yield


def _load_spread(
    folder: Path, dtype: torch.dtype, groups: Groups, offload: bool
) -> torch.nn.Module:
    """Load the model with its weights spread over all ranks from the moment they are read."""
    if not groups.platform.is_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    # Disable DeepSpeed's shared-memory collectives: compiling them takes minutes on every machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend=groups.platform.backend, dist_init_required=False, verbose=False
    )
    settings = _zero3_settings(dtype, offload, groups.platform.is_cuda)
    # transformers spreads weights while it reads them for as long as this object lives.
    spreading = HfDeepSpeedConfig(settings)
    model = load_causal_lm(folder, dtype, setting=CHECKPOINT_KEY)
    del spreading
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    module: torch.nn.Module = engine.module
    # The engine owns the hooks that gather and release weights.
    module._spread_by = [engine]  # type: ignore[assignment]
    return module


def _zero3_settings(dtype: torch.dtype, offload: bool, on_cuda: bool) -> dict[str, Any]:
    """Return DeepSpeed's settings for a frozen model."""
    zero: dict[str, Any] = {
        "stage": 3,
        # Norms stay whole: gathering them costs more messages than they are worth.
        "stage3_param_persistence_threshold": 20_000,
    }
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_cuda}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": zero,
    }


def build_huggingface_teacher(
    config: RunConfig, inputs: TeacherInputs, groups: Groups, *, zero3: bool
) -> HuggingFaceTeacher:
    """Build the teacher of a Hugging Face folder.

    Args:
        config: the run.
        inputs: its checked teacher.
        groups: the student's groups.
        zero3: spread the weights over all ranks.

    Raises:
        ConfigError: on every rank, if the model cannot serve as a teacher.

    Collectives:
        Over the world.
    """
    assert inputs.folder is not None
    padded = padded_vocab_size(inputs.vocab_size, config.model.vocab_size_multiple)
    settings = HuggingFaceSettings(
        precision=config.teacher.precision or config.train.precision,
        vocab_size=inputs.vocab_size,
        rows=padded // config.parallel.tensor,
        sequence_parallel=config.parallel.sequence_parallel,
        zero3=zero3,
        offload=config.teacher.offload,
    )
    make_target = configured_maker(config, inputs, groups)
    return HuggingFaceTeacher(inputs.folder, groups, make_target, settings)
