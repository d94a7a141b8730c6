"""A frozen teacher in the student's job: its own forward-only pipeline, run before the student's schedule.

Only sparse targets (or, where whole distributions are compared, final hidden states) survive it, so nothing of megatron-core is
patched, the student may use any schedule, and the teacher never meets gradients, the optimizer or the student's checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megatron_kd.config import ModelSection, ParallelSection
from megatron_kd.data.batches import Microbatch
from megatron_kd.models.gpt_model import build_chunks, output_weight
from megatron_kd.models.layer_outputs import LayerOutputs
from megatron_kd.models.transformer_config import transformer_config
from megatron_kd.parallel.groups import Groups
from megatron_kd.targets import DenseTarget, Selection, SparseTarget, Target, linear_targets
from megatron_kd.targets.keys import token_keys


class MakeTarget(Protocol):
    """What becomes of the teacher's final hidden states of one microbatch: `SelectTargets`, `KeepHidden`."""

    def __call__(self, hidden: Tensor, weight: Tensor, token_keys: Tensor) -> Target:
        """hidden [S, B, H] (this rank's slice of S under sequence parallelism), weight [V/tp, H], token_keys int64 [S, B]."""
        ...


@dataclass(frozen=True)
class SelectTargets:
    """Sparse targets [S, B, K]."""

    selection: Selection
    groups: Groups
    vocab_size: int
    sequence_parallel: bool
    chunk_tokens: int | None

    def __call__(self, hidden: Tensor, weight: Tensor, token_keys: Tensor) -> SparseTarget:
        """See MakeTarget."""
        return linear_targets(
            hidden,
            weight,
            self.selection,
            vocab_size=self.vocab_size,
            tp_group=self.groups.tp,
            sequence_parallel=self.sequence_parallel,
            chunk_tokens=self.chunk_tokens,
            token_keys=token_keys,
        )


class KeepHidden:
    """The hidden states themselves, for the student's head to multiply chunk by chunk."""

    def __call__(self, hidden: Tensor, weight: Tensor, token_keys: Tensor) -> DenseTarget:
        """See MakeTarget."""
        return DenseTarget(hidden.detach(), weight.detach())


class OnlineTeacher:
    """A frozen GPT in the student's tensor- and pipeline-parallel layout (without virtual stages).

    Weights are uninitialised on construction: load them into `models` before the first `targets`. selection: how sparse
    targets are chosen; None keeps the hidden states, for whole distributions. precision: "fp8" multiplies in fp8 in the layers
    (Transformer Engine) and holds bf16 weights. layers: those whose outputs are kept too, counted from 1. resident: what the weights
    are brought to the device with.
    """

    def __init__(
        self,
        model: ModelSection,
        parallel: ParallelSection,
        groups: Groups,
        selection: Selection | None,
        *,
        precision: str,
        vocab_size: int,
        sequence_length: int,
        chunk_tokens: int | None = None,
        within_documents: bool = False,
        layers: Collection[int] = (),
    ) -> None:
        self.groups, self.sequence_length, self.within_documents = (
            groups,
            sequence_length,
            within_documents,
        )
        # The forward-only pass needs no interleaving; the same groups serve one chunk per stage.
        plain = parallel.model_copy(update={"virtual_pipeline": 1})
        self.config = transformer_config(model, plain, groups.platform, precision=precision)
        self.resident: Callable[[], AbstractContextManager[None]] = nullcontext
        self.models: list[GPTModel] = build_chunks(
            model,
            self.config,
            groups,
            vocab_size=vocab_size,
            sequence_length=sequence_length,
            within_documents=within_documents,
        )
        for chunk in self.models:
            chunk.requires_grad_(False)
            chunk.eval()
        self.layer_outputs = LayerOutputs(self.models, layers)
        self._kept: list[dict[int, Tensor]] = []
        self.make_target: MakeTarget = (
            KeepHidden()
            if selection is None
            else SelectTargets(
                selection, groups, vocab_size, self.config.sequence_parallel, chunk_tokens
            )
        )

    @torch.no_grad()
    def targets(self, microbatches: Sequence[Microbatch]) -> list[Target | None]:
        """See TeacherSource. One forward-only pipeline over the microbatches; collective over the model-parallel groups."""
        self._kept = []
        if not microbatches:
            return []
        with self.resident():
            found = self._run(microbatches)
        return found if self.groups.is_last_stage else [None] * len(microbatches)

    def _run(self, microbatches: Sequence[Microbatch]) -> list[Target | None]:
        schedule = get_forward_backward_func(pp_size=self.groups.pipeline_size, vp_size=None)
        found: list[Target | None] = schedule(
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
        return found

    def take_layer_outputs(self) -> list[dict[int, Tensor]]:
        """Of each microbatch of the last `targets`: layer -> its output [S, B, H], of the layers that are on this rank. Forgets them."""
        kept, self._kept = self._kept, []
        return kept

    def _communicator(self) -> P2PCommunicator | None:
        return (
            P2PCommunicator(pp_group=self.groups.collection.pp, config=self.config)
            if self.groups.pipeline_size > 1
            else None
        )

    def _forward_step(
        self, microbatches: Iterator[Microbatch], chunk: GPTModel
    ) -> tuple[Tensor, Any]:
        microbatch = next(microbatches)
        with self.layer_outputs.watching() as seen:
            hidden = chunk(
                input_ids=microbatch.tokens,
                position_ids=microbatch.position_ids,
                attention_mask=microbatch.attention_mask(),
            )
        # Tensors of their own: the schedule may empty the one that it has sent on.
        self._kept.append({layer: output.detach() for layer, output in seen.items()})
        return hidden, partial(self._target, chunk=chunk, microbatch=microbatch)

    def _target(
        self, hidden: Tensor, *, chunk: GPTModel, microbatch: Microbatch, non_loss_data: bool = True
    ) -> Target:
        """The last stage's hidden states [S, B, H] become a target."""
        return self.make_target(
            hidden, output_weight(chunk), token_keys(microbatch.sample_keys, self.sequence_length)
        )
