"""Run a frozen teacher of this program in its own forward-only pipeline, before the student.

Only sparse targets, or final hidden states for dense targets, are kept. Nothing of megatron-core is
patched, and the teacher is independent of gradients, the optimizer, the student's checkpoint and
its pipeline schedule.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_kd.checkpoint.sharded_state import load_weights
from megatron_kd.checkpoint.store import checkpoint_digest
from megatron_kd.config import ConfigError, RunConfig
from megatron_kd.data.batches import Microbatch
from megatron_kd.models.gpt_model import build_chunks, output_weight
from megatron_kd.models.layer_outputs import LayerOutputs
from megatron_kd.models.transformer_config import transformer_config
from megatron_kd.parallel.collectives import from_rank_zero
from megatron_kd.parallel.groups import Groups
from megatron_kd.parallel.vocab_shards import padded_vocab_size
from megatron_kd.targets.dense import Target, same_vocabulary_ranges
from megatron_kd.targets.sample_keys import token_keys
from megatron_kd.teacher.runtime.offload import OffloadedWeights
from megatron_kd.teacher.runtime.targets import configured_maker
from megatron_kd.teacher.source import CHECKPOINT_KEY, TeacherInputs
from megatron_kd.teacher.teacher import Teacher, TeacherLayers


class OnlineTeacher(Teacher):
    """Run a frozen GPT in the tensor- and pipeline-parallel layout of its groups.

    Weights are uninitialised on construction: load them into `models` before the first `targets`.
    With teacher.precision = "fp8" the layers multiply in fp8 (Transformer Engine) and hold bf16
    weights.

    Args:
        config: the run; `config.parallel` is the layout of `groups`.
        inputs: the checked teacher.
        groups: the teacher's groups.
        layers: whose outputs are kept too, counted from 1.

    Attributes:
        models: this rank's chunks.
        make_target: what becomes of the final hidden states.
        resident: context in which the weights are on the device.
    """

    def __init__(
        self,
        config: RunConfig,
        inputs: TeacherInputs,
        groups: Groups,
        *,
        layers: Collection[int] = (),
    ) -> None:
        assert inputs.model is not None
        self.groups, self.sequence_length = groups, config.batch.sequence_length
        self.within_documents = config.data.document_attention == "within"
        # The forward-only pass needs no interleaving; the same groups serve one chunk per stage.
        parallel = config.parallel.model_copy(update={"virtual_pipeline": 1})
        self.config = transformer_config(
            inputs.model,
            parallel,
            groups.platform,
            precision=config.teacher.precision or config.train.precision,
        )
        self.resident: AbstractContextManager[None] = nullcontext()
        self.models: list[GPTModel] = build_chunks(
            inputs.model,
            self.config,
            groups,
            vocab_size=inputs.vocab_size,
            sequence_length=self.sequence_length,
            within_documents=self.within_documents,
        )
        for chunk in self.models:
            chunk.requires_grad_(False)
            chunk.eval()
        self.layers: OnlineLayers = OnlineLayers(
            self.config, self.sequence_length, LayerOutputs(self.models, layers)
        )
        self.make_target = configured_maker(config, inputs, groups)

    @torch.no_grad()
    def targets(
        self, microbatches: Sequence[Microbatch], *, step: int | None = None
    ) -> list[Target | None]:
        """Run one forward-only pipeline over the microbatches.

        Collective over the model-parallel groups. See Teacher.
        """
        self.layers.clear()
        if not microbatches:
            return []
        with self.resident:
            targets = self._run_pipeline(microbatches)
        return targets if self.groups.is_last_stage else [None] * len(microbatches)

    def _run_pipeline(self, microbatches: Sequence[Microbatch]) -> list[Target | None]:
        forward_pass = get_forward_backward_func(pp_size=self.groups.pipeline_size, vp_size=None)
        targets: list[Target | None] = forward_pass(
            forward_step_func=self._forward_step,
            data_iterator=iter(microbatches),
            model=self.models[0],
            num_microbatches=len(microbatches),
            seq_length=self.sequence_length,
            micro_batch_size=microbatches[0].tokens.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
            p2p_communicator=self._communicator(),
            pg_collection=self.groups.collection,
        )
        return targets

    def _communicator(self) -> P2PCommunicator | None:
        if self.groups.pipeline_size == 1:
            return None
        return P2PCommunicator(pp_group=self.groups.collection.pp, config=self.config)

    def _forward_step(
        self, microbatches: Iterator[Microbatch], chunk: GPTModel
    ) -> tuple[Tensor, Any]:
        microbatch = next(microbatches)
        with self.layers.recording():
            hidden = chunk(
                input_ids=microbatch.tokens,
                position_ids=microbatch.position_ids,
                attention_mask=microbatch.attention_mask(),
            )
        return hidden, partial(self._target, chunk=chunk, microbatch=microbatch)

    def _target(
        self, hidden: Tensor, *, chunk: GPTModel, microbatch: Microbatch, non_loss_data: bool = True
    ) -> Target:
        """Turn the last stage's hidden states [S, B, H] into a target."""
        keys = token_keys(microbatch.sample_keys, self.sequence_length)
        return self.make_target(hidden, output_weight(chunk), keys)


class OnlineLayers(TeacherLayers):
    """Keep the layer outputs of the microbatches of one step."""

    def __init__(
        self, config: TransformerConfig, sequence_length: int, outputs: LayerOutputs
    ) -> None:
        self.num_layers: int = config.num_layers
        self.dtype = config.params_dtype
        slices = config.tensor_model_parallel_size if config.sequence_parallel else 1
        self._sequence, self._hidden_size = sequence_length // slices, config.hidden_size
        self._outputs = outputs
        self.layers_on_rank = outputs.local_layers
        self._kept: list[dict[int, Tensor]] = []

    def clear(self) -> None:
        """Forget what was kept."""
        self._kept = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the outputs of one microbatch's forward pass, which runs inside."""
        with self._outputs.record() as outputs:
            yield
        # Detached tensors: the pipeline schedule may empty those that it has sent on.
        self._kept.append({layer: output.detach() for layer, output in outputs.items()})

    def microbatch_shape(self, micro_batch_size: int) -> tuple[int, int, int]:
        """See TeacherLayers."""
        return self._sequence, micro_batch_size, self._hidden_size

    def take_outputs(self) -> list[dict[int, Tensor]]:
        """See TeacherLayers."""
        kept, self._kept = self._kept, []
        return kept


def build_online_teacher(
    config: RunConfig, inputs: TeacherInputs, groups: Groups, *, layers: Collection[int] = ()
) -> OnlineTeacher:
    """Build the teacher of teacher.checkpoint and load its weights.

    Args:
        config: the run; `config.parallel` is the layout of `groups`.
        inputs: the checked teacher.
        groups: the teacher's groups.
        layers: whose outputs it keeps, counted from 1.

    Raises:
        ConfigError: on every rank, if it needs a GPU and there is none.

    Collectives:
        Over the world.
    """
    assert inputs.folder is not None
    _check_device(config, groups)
    teacher = OnlineTeacher(config, inputs, groups, layers=layers)
    load_weights(inputs.folder, teacher.models, setting=CHECKPOINT_KEY)
    if config.teacher.offload:
        teacher.resident = OffloadedWeights(teacher.models, groups.platform.device)
    return teacher


def _check_device(config: RunConfig, groups: Groups) -> None:
    """Raise ConfigError, on every rank, for what only a GPU can do."""
    cuda = groups.platform.is_cuda
    if config.teacher.offload and not cuda:
        raise ConfigError(
            "teacher.offload keeps the teacher in CPU memory, where this run on a CPU has it "
            "anyway: unset it"
        )
    if config.teacher.precision == "fp8":
        engine = importlib.util.find_spec("transformer_engine") is not None
        if not (cuda and engine and torch.cuda.get_device_capability() >= (8, 9)):
            raise ConfigError(
                'teacher.precision = "fp8" needs Transformer Engine and a GPU that multiplies in '
                'fp8 (compute capability 8.9 or later): set "bf16"'
            )


def check_same_padding(config: RunConfig, inputs: TeacherInputs) -> None:
    """Check that teacher and student hold the same ids on each rank, if logits are compared.

    Raises:
        ConfigError: distill.dense is set and their padded vocabularies are split differently.
    """
    if not config.distill.dense or inputs.model is None:
        return
    tensor, multiple = config.parallel.tensor, inputs.model.vocab_size_multiple
    student_rows, teacher_rows = (
        padded_vocab_size(inputs.vocab_size, padding) // tensor
        for padding in (config.model.vocab_size_multiple, multiple)
    )
    if not same_vocabulary_ranges(student_rows, teacher_rows, inputs.vocab_size):
        raise ConfigError(
            f"distill.dense with parallel.tensor = {tensor} needs teacher and student to pad the "
            f"vocabulary alike: set model.vocab_size_multiple ({config.model.vocab_size_multiple}) "
            f"to the teacher's {multiple}"
        )


def digest_on_rank_zero(folder: Path, patterns: Iterable[str] = ("*",)) -> str:
    """Return the digest of a folder's files, computed by rank 0. One broadcast over the world."""
    return from_rank_zero(lambda: checkpoint_digest(folder, patterns))
