"""A frozen teacher that transformers runs: any causal language model in a local folder, in the student's job.

The ranks that share one student replica split its microbatches among them and hand the final hidden states round; the teacher's
head is cut over the student's tensor group, and targets are made from both as from any other teacher's. Weights are whole on each
rank, or spread over all ranks by DeepSpeed's ZeRO-3.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_kd.config import ConfigError
from megatron_kd.data.batches import Microbatch
from megatron_kd.models.huggingface.transformers_model import load_causal_lm
from megatron_kd.models.transformer_config import DTYPES
from megatron_kd.parallel.collectives import all_gather, group_rank, group_size, raise_together
from megatron_kd.parallel.groups import Groups
from megatron_kd.targets import Selection, Target
from megatron_kd.targets.keys import token_keys
from megatron_kd.teacher.online import KeepHidden, MakeTarget, SelectTargets

_WHAT = "teacher.checkpoint"
# Largest difference of logits that counts as rounding, relative to the largest logit.
_ROUNDING = {"fp32": 1e-4, "bf16": 4e-2}


class HuggingFaceTeacher:
    """TeacherSource on AutoModelForCausalLM. Construction and `targets` are collective over the world.

    rows: vocabulary rows of each tensor-parallel rank, as the student pads them. selection: None keeps the hidden states. ConfigError on
    every rank where the model's logits are not its final hidden states times its head (soft caps, scaled logits, biases).
    """

    def __init__(
        self,
        folder: Path,
        groups: Groups,
        selection: Selection | None,
        *,
        precision: str,
        vocab_size: int,
        rows: int,
        sequence_parallel: bool = False,
        chunk_tokens: int | None = None,
        zero3: bool = False,
        offload: bool = False,
    ) -> None:
        self.groups, self.vocab_size, self.precision = groups, vocab_size, precision
        self.sequence_parallel = sequence_parallel
        shared = groups.tensor_size * groups.pipeline_size
        self._replica = groups.collection.mp if shared > 1 else None
        dtype, device = DTYPES[precision], groups.platform.device
        model, problem = None, None
        if zero3:
            model = _spread(folder, dtype, groups, offload)
        else:
            try:
                model = load_causal_lm(folder, dtype, what=_WHAT).to(device)
            except ConfigError as error:
                problem = str(error)
            raise_together(problem, ConfigError)
        assert model is not None
        self.model: Any = model.requires_grad_(False).eval()
        self.head = self._take_head(rows)
        self.make_target: MakeTarget = (
            KeepHidden()
            if selection is None
            else SelectTargets(selection, groups, vocab_size, sequence_parallel, chunk_tokens)
        )

    @torch.no_grad()
    def targets(self, microbatches: Sequence[Microbatch]) -> list[Target | None]:
        """See TeacherSource. One all-gather of hidden states over the replica's ranks for as many microbatches as it has ranks."""
        ranks, place = group_size(self._replica), group_rank(self._replica)
        found: list[Target | None] = []
        for start in range(0, len(microbatches), ranks):
            group = microbatches[start : start + ranks]
            # Every rank runs as often as every other, as ZeRO-3 wants it; what is over repeats the last.
            mine = self._hidden(group[min(place, len(group) - 1)].tokens)
            everyone = all_gather(mine, self._replica)
            for hidden, microbatch in zip(everyone, group, strict=False):
                found.append(
                    self._target(hidden, microbatch) if self.groups.is_last_stage else None
                )
        return found

    def _hidden(self, tokens: Tensor) -> Tensor:
        """Final hidden states [S, B, H] of tokens [B, S]: the head hands on what it is given."""
        hidden: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return hidden.transpose(0, 1).to(DTYPES[self.precision]).contiguous()

    def _target(self, hidden: Tensor, microbatch: Microbatch) -> Target:
        length = hidden.shape[0]
        if self.sequence_parallel:
            hidden = hidden.chunk(self.groups.tensor_size)[self.groups.tensor_rank].contiguous()
        return self.make_target(hidden, self.head, token_keys(microbatch.sample_keys, length))

    @torch.no_grad()
    def _take_head(self, rows: int) -> Tensor:
        """[rows, H], this tensor rank's rows of the head (zero past the vocabulary); the model's own head then hands hidden states on."""
        head = self.model.get_output_embeddings()
        weight: Tensor | None = getattr(head, "weight", None)
        problem = None
        if weight is None or getattr(head, "bias", None) is not None:
            problem = f"{_WHAT}: the teacher's head is not one matrix without bias, which targets are made from: convert or choose another"
        raise_together(problem, ConfigError)
        assert weight is not None
        start = rows * self.groups.tensor_rank
        with _whole(weight):
            mine = torch.zeros(
                rows,
                weight.shape[1],
                dtype=DTYPES[self.precision],
                device=self.groups.platform.device,
            )
            held = max(0, min(rows, self.vocab_size - start))
            mine[:held] = weight[start : start + held].to(mine)
        tokens = torch.randint(
            self.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0)
        ).to(mine.device)
        wanted = self.model(input_ids=tokens, use_cache=False).logits[0].float()
        self.model.set_output_embeddings(_HandOn())
        logits = self._hidden(tokens)[:, 0].float() @ mine[:held].float().T
        wanted = wanted[:, start : start + held]
        difference, scale = (
            float((logits - wanted).abs().max()) if held else 0.0,
            float(wanted.abs().max()) if held else 0.0,
        )
        if not difference <= _ROUNDING[self.precision] * max(1.0, scale):
            problem = (
                f"{_WHAT}: the teacher's logits are not its final hidden states times its head (a soft cap, scaled logits or the like; "
                f"they differ by {difference:.3g}): such a model cannot be a teacher here"
            )
        raise_together(problem, ConfigError)
        return mine


class _HandOn(torch.nn.Module):
    """Stands in the place of the head."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


@contextlib.contextmanager
def _whole(weight: Tensor) -> Iterator[None]:
    """Inside, the parameter is whole on every rank, also where ZeRO-3 has spread it."""
    if not hasattr(weight, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        yield


def _spread(folder: Path, dtype: torch.dtype, groups: Groups, offload: bool) -> torch.nn.Module:
    """The model with its weights spread over all ranks from the moment they are read."""
    if not groups.platform.is_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": 3,
            # Norms stay whole: gathering them costs more messages than they are worth.
            "stage3_param_persistence_threshold": 20_000,
            **(
                {"offload_param": {"device": "cpu", "pin_memory": groups.platform.is_cuda}}
                if offload
                else {}
            ),
        },
    }
    # On a CPU its faster messages between processes of one machine would first be compiled, for minutes, on every machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend=groups.platform.backend, dist_init_required=False, verbose=False
    )
    # transformers spreads weights while it reads them for as long as this object lives.
    spreading = HfDeepSpeedConfig(settings)
    model = load_causal_lm(folder, dtype, what=_WHAT)
    del spreading
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    module: torch.nn.Module = engine.module
    # The engine owns the hooks that gather and release weights.
    module._spread_by = [engine]  # type: ignore[assignment]
    return module
