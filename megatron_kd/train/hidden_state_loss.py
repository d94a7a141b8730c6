"""Hidden states of chosen layers compared with the teacher's, on whatever pipeline stages the two are.

The loss of a pair is formed on the rank that holds the student's layer, as soon as its chunk's forward pass is done, and so are its
gradients. That of the hidden state enters the backward pass at the layer's output, through a hook on the tensor; that of a projection
at the chunk's output, through an identity that hands it to autograd, so that megatron-core's DDP meets it like any other. Nothing
depends on the order of a schedule, and what is recomputed in the backward pass is not looked at. Sums over tokens, like the main
loss: megatron-core divides all gradients by the global number of tokens once, and scales none (that is for fp16, which is not
offered).

Memory, per microbatch on its way from forward to backward: one gradient [S, B, Hs] for each student layer named, in the layer's type;
while it is formed, some fp32 copies of one pair's states. The teacher's states of a whole step stay on the ranks of the student's
layers: [S, B, Ht] per microbatch and teacher layer. Shapes: S tokens (the rank's slice under sequence parallelism), B micro-batch
size, Hs and Ht widths of student and teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_kd.config import ConfigError, RunConfig
from megatron_kd.config.hidden_state_pairs import Projection
from megatron_kd.data.batches import Microbatch
from megatron_kd.losses.hidden_state_distances import HIDDEN_DISTANCES, HiddenDistance
from megatron_kd.models.layer_outputs import LayerOutputs
from megatron_kd.models.projections import projections_on
from megatron_kd.models.student import Student
from megatron_kd.parallel.collectives import exchange, raise_together
from megatron_kd.parallel.groups import Groups
from megatron_kd.parallel.pipeline_stages import stage_of_layer
from megatron_kd.teacher.online import OnlineTeacher
from megatron_kd.teacher.source import TeacherSource

# (DDP-wrapped chunk, microbatch) -> the chunk's output.
Through = Callable[[Any, Microbatch], Tensor]


def forward(chunk: Any, microbatch: Microbatch) -> Tensor:
    """The chunk's forward pass, and nothing else."""
    output: Tensor = chunk(
        input_ids=microbatch.tokens,
        position_ids=microbatch.position_ids,
        attention_mask=microbatch.attention_mask(),
    )
    return output


class HiddenStates(Protocol):
    """What a run does about hidden states. Every method is called on every rank alike."""

    def through(self, microbatches: Sequence[Microbatch]) -> Through:
        """How these microbatches, just seen by the teacher, pass through the student's chunks. May be collective over the pipeline."""

    def take_reports(self) -> list[dict[str, Tensor]]:
        """What this rank adds to the metrics since the last call. No collective."""


class NoHiddenStates:
    """Nothing is compared."""

    def through(self, microbatches: Sequence[Microbatch]) -> Through:
        """See HiddenStates."""
        return forward

    def take_reports(self) -> list[dict[str, Tensor]]:
        """See HiddenStates."""
        return []


@dataclass(frozen=True)
class Pair:
    """One entry of distill.hidden_states. stages: of the teacher's layer and of the student's. counts: one entry of a run counts tokens."""

    student_layer: int
    teacher_layer: int
    distance: HiddenDistance
    weight: float
    stages: tuple[int, int]
    counts: bool

    @property
    def projection(self) -> str:
        """Name of its projection, where it has one."""
        return Projection(self.student_layer, self.teacher_layer, 0).name


class TeacherLayers:
    """The teacher's layer outputs, brought to where the student's layers are.

    One all-to-all over each pipeline group a step, between ranks of the same tensor- and data-parallel place; none where no pair
    crosses stages.
    """

    def __init__(self, teacher: OnlineTeacher, pairs: Sequence[Pair], groups: Groups) -> None:
        self._teacher, self._groups = teacher, groups
        # (from stage, to stage) -> layers, in an order that both know.
        self._routes: dict[tuple[int, int], list[int]] = {}
        for pair in pairs:
            layers = self._routes.setdefault(pair.stages, [])
            if pair.teacher_layer not in layers:
                layers.append(pair.teacher_layer)
        self._crosses = any(start != end for start, end in self._routes)

    def fetch(self, microbatches: Sequence[Microbatch]) -> list[dict[int, Tensor]]:
        """Of each microbatch: teacher layer -> [S, B, Ht], of the layers that this rank's student layers are compared with."""
        kept, here = self._teacher.take_layer_outputs(), self._groups.pipeline_rank
        local = self._routes.get((here, here), [])
        found = [{layer: outputs[layer] for layer in local} for outputs in kept]
        if not self._crosses:
            return found
        config = self._teacher.config
        slices = config.tensor_model_parallel_size if config.sequence_parallel else 1
        shape = (
            len(kept),
            self._teacher.sequence_length // slices,
            microbatches[0].tokens.shape[0],
            config.hidden_size,
        )
        like = torch.empty(0, dtype=config.params_dtype, device=self._groups.platform.device)
        sends = {
            end: torch.stack([outputs[layer] for layer in layers for outputs in kept])
            for (start, end), layers in self._routes.items()
            if start == here != end
        }
        incoming = {
            start: layers for (start, end), layers in self._routes.items() if start != here == end
        }
        sizes = {
            start: len(layers) * torch.Size(shape).numel() for start, layers in incoming.items()
        }
        received = exchange(sends, sizes, like=like, group=self._groups.collection.pp)
        for start, layers in incoming.items():
            for layer, states in zip(
                layers, received[start].view(len(layers), *shape), strict=True
            ):
                for outputs, state in zip(found, states, strict=True):
                    outputs[layer] = state
        return found


class HiddenStatesLoss:
    """Adds weight * distance(student layer, teacher layer), summed over the tokens of the loss, for each pair."""

    def __init__(
        self, pairs: Sequence[Pair], student: Student, teacher: OnlineTeacher, groups: Groups
    ) -> None:
        self.pairs, self._groups = pairs, groups
        self.student_outputs = LayerOutputs(student.models, {pair.student_layer for pair in pairs})
        self._teacher_layers = TeacherLayers(teacher, pairs, groups)
        self._sequence_parallel = student.config.sequence_parallel
        # Without sequence parallelism all tensor-parallel ranks hold the same states: one of them reports.
        self._reporting = self._sequence_parallel or groups.tensor_rank == 0
        self._reports: list[dict[str, Tensor]] = []

    def through(self, microbatches: Sequence[Microbatch]) -> Through:
        """See HiddenStates."""
        states = self._teacher_layers.fetch(microbatches)
        # Each virtual stage walks through the same microbatches by itself.
        return partial(
            self._forward,
            {id(each): state for each, state in zip(microbatches, states, strict=True)},
        )

    def take_reports(self) -> list[dict[str, Tensor]]:
        """See HiddenStates."""
        reports, self._reports = self._reports, []
        return reports

    def _forward(
        self, states: dict[int, dict[int, Tensor]], chunk: Any, microbatch: Microbatch
    ) -> Tensor:
        with self.student_outputs.watching() as seen:
            output = forward(chunk, microbatch)
        if seen.keys() != self.student_outputs.on(chunk.module):
            raise RuntimeError(
                "a layer of distill.hidden_states ran without being seen: something replaces the forward pass of layers"
            )
        return (
            self._add_losses(output, chunk.module, seen, states[id(microbatch)], microbatch)
            if seen
            else output
        )

    def _add_losses(
        self,
        output: Tensor,
        model: GPTModel,
        seen: dict[int, Tensor],
        states: dict[int, Tensor],
        microbatch: Microbatch,
    ) -> Tensor:
        """The chunk's output, with the gradients of its pairs in the graph where there is one."""
        training, mask = torch.is_grad_enabled(), self._mask(microbatch)
        projections = projections_on(model)
        of_layers: dict[int, Tensor] = {}
        of_weights: dict[str, Tensor] = {}
        for pair in (pair for pair in self.pairs if pair.student_layer in seen):
            hidden = seen[pair.student_layer].detach().requires_grad_(training)
            projection = projections.get(pair.projection)
            losses = pair.distance(
                hidden if projection is None else projection(hidden), states[pair.teacher_layer]
            )
            loss_sum = pair.weight * (losses * mask).sum()
            self._report(loss_sum, mask.sum() if pair.counts else mask.new_zeros(()))
            if training:
                weights = [] if projection is None else list(projection.parameters())
                gradient, *rest = torch.autograd.grad(loss_sum, [hidden, *weights])
                _add(of_layers, pair.student_layer, gradient)
                for each in rest:
                    _add(of_weights, pair.projection, each)
        for layer, gradient in of_layers.items():
            seen[layer].register_hook(partial(torch.add, gradient))
        if not of_weights:
            return output
        weights = [weight for name in of_weights for weight in projections[name].parameters()]
        with_gradients: Tensor = _WithGradients.apply(output, *weights, *of_weights.values())
        # The schedule frees what it has sent on, which it cannot do to a view.
        freed: Tensor = make_viewless_tensor(with_gradients, requires_grad=True, keep_graph=True)
        return freed

    def _mask(self, microbatch: Microbatch) -> Tensor:
        """fp32 [S, B], of this rank's slice of the tokens."""
        mask = microbatch.loss_mask.t()
        return (
            mask.chunk(self._groups.tensor_size)[self._groups.tensor_rank]
            if self._sequence_parallel
            else mask
        )

    def _report(self, loss_sum: Tensor, count: Tensor) -> None:
        if self._reporting:
            total = loss_sum.detach()
            self._reports.append(
                {
                    "hidden_loss": torch.stack([total, count]),
                    "total_loss": torch.stack([total, torch.zeros_like(total)]),
                }
            )


def _add(sums: dict[Any, Tensor], name: Any, gradient: Tensor) -> None:
    sums[name] = sums[name] + gradient if name in sums else gradient


class _WithGradients(torch.autograd.Function):
    """Hands `output` on; in the backward pass the weights get the gradients that are known already."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *weights_and_gradients: Tensor) -> Tensor:
        ctx.save_for_backward(*weights_and_gradients[len(weights_and_gradients) // 2 :])
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        known = ctx.saved_tensors
        return (gradient, *known, *[None] * len(known))


def build_hidden_states(
    config: RunConfig, student: Student, teacher: TeacherSource, groups: Groups
) -> HiddenStates:
    """What distill.hidden_states asks for. Collective over the world where it asks for anything."""
    entries = config.distill.hidden_states
    if not entries:
        return NoHiddenStates()
    assert isinstance(teacher, OnlineTeacher)
    pipeline, virtual, theirs = (
        groups.pipeline_size,
        config.parallel.virtual_pipeline,
        teacher.config.num_layers,
    )
    pairs = [
        Pair(
            student_layer=entry.student_layer,
            teacher_layer=entry.teacher_layer,
            distance=HIDDEN_DISTANCES[entry.loss],
            weight=entry.weight,
            stages=(
                stage_of_layer(entry.teacher_layer, theirs, pipeline=pipeline),
                stage_of_layer(
                    entry.student_layer, config.model.num_layers, pipeline=pipeline, virtual=virtual
                ),
            ),
            counts=number == 0,
        )
        for number, entry in enumerate(entries)
    ]
    loss = HiddenStatesLoss(pairs, student, teacher, groups)
    _check_places(pairs, loss.student_outputs, teacher, groups)
    return loss


def _check_places(
    pairs: Sequence[Pair], student_outputs: LayerOutputs, teacher: OnlineTeacher, groups: Groups
) -> None:
    """ConfigError on every rank where a layer is not on the stage that it is looked for on: [model.mcore] can place layers unevenly."""
    here = groups.pipeline_rank
    expected = (
        {pair.teacher_layer for pair in pairs if pair.stages[0] == here},
        {pair.student_layer for pair in pairs if pair.stages[1] == here},
    )
    problem = None
    if (teacher.layer_outputs.here, student_outputs.here) != expected:
        problem = "distill.hidden_states needs pipeline stages of equally many layers: remove what places them otherwise from [model.mcore]"
    raise_together(problem, ConfigError)
