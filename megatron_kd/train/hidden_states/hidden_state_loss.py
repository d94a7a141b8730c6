"""Compare hidden states of chosen layers with the teacher's, on any pipeline stages.

The loss of a pair is formed on the rank that holds the student's layer, as soon as its chunk's
forward pass is done, and so are its gradients. The gradient of the hidden state enters the backward
pass at the layer's output, through a hook on the tensor. The gradient of a projection enters at the
chunk's output, through an identity that passes it to autograd, so that megatron-core's DDP treats
it like any other. Nothing depends on the order of a pipeline schedule, and what is recomputed in
the backward pass is ignored. Losses are sums over tokens, like the main loss: megatron-core divides
all gradients by the global number of tokens once, and scales none (scaling is for fp16, which is
not offered).

Memory, per microbatch between its forward and backward pass: one gradient [S, B, Hs] for each
student layer named, in the layer's type; while it is formed, some fp32 copies of one pair's states.
The teacher's states of a whole step stay on the ranks of the student's layers: [S, B, Ht] per
microbatch and teacher layer. Shapes: S tokens (the rank's slice under sequence parallelism), B
micro-batch size, Hs and Ht widths of student and teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_kd.config import ConfigError, RunConfig
from megatron_kd.data.batches import Microbatch
from megatron_kd.losses.hidden_state_distances import HIDDEN_DISTANCES
from megatron_kd.models.layer_outputs import LayerOutputs
from megatron_kd.models.projections import projections_on
from megatron_kd.models.student import Student
from megatron_kd.parallel.collectives import raise_together
from megatron_kd.parallel.groups import Groups
from megatron_kd.parallel.pipeline_stages import stage_of_layer
from megatron_kd.teacher.teacher import Teacher, TeacherLayers
from megatron_kd.train.forward import StudentInput, run_chunk
from megatron_kd.train.hidden_states.layer_exchange import LayerExchange, LayerPair


class HiddenStates:
    """Base class of the hidden-state part of a run.

    Every method is called on every rank alike.
    """

    def teacher_layers(self, microbatches: Sequence[Microbatch]) -> list[dict[int, Tensor]]:
        """Return the teacher's layer outputs that this rank needs, a dict per microbatch.

        The teacher has just made the targets of these microbatches. Each dict maps a teacher layer
        to its output [S, B, Ht]. May be collective over the pipeline group.
        """
        raise NotImplementedError

    def forward(self, chunk: Any, item: StudentInput) -> Tensor:
        """Return a DDP-wrapped chunk's output for one microbatch."""
        raise NotImplementedError

    def take_reports(self) -> list[dict[str, Tensor]]:
        """Return and forget this rank's reports since the last call. No collective."""
        raise NotImplementedError


class NoHiddenStates(HiddenStates):
    """Compare nothing."""

    def teacher_layers(self, microbatches: Sequence[Microbatch]) -> list[dict[int, Tensor]]:
        """See HiddenStates."""
        return [{} for _ in microbatches]

    def forward(self, chunk: Any, item: StudentInput) -> Tensor:
        """See HiddenStates."""
        return run_chunk(chunk, item.microbatch)

    def take_reports(self) -> list[dict[str, Tensor]]:
        """See HiddenStates."""
        return []


class HiddenStatesLoss(HiddenStates):
    """Add weight * distance(student layer, teacher layer) per pair, summed over the loss's tokens.

    Args:
        pairs: what is compared.
        student: the model that learns.
        teacher_layers: the teacher's layer outputs.
        groups: of the student.
    """

    def __init__(
        self,
        pairs: Sequence[LayerPair],
        student: Student,
        teacher_layers: TeacherLayers,
        groups: Groups,
    ) -> None:
        self.pairs, self._groups = pairs, groups
        self.student_outputs = LayerOutputs(student.models, {pair.student_layer for pair in pairs})
        self._exchange = LayerExchange(teacher_layers, pairs, groups)
        self._sequence_parallel = student.config.sequence_parallel
        # Without sequence parallelism all tensor-parallel ranks hold the same states: one reports.
        self._reporting = self._sequence_parallel or groups.tensor_rank == 0
        self._reports: list[dict[str, Tensor]] = []

    def teacher_layers(self, microbatches: Sequence[Microbatch]) -> list[dict[int, Tensor]]:
        """See HiddenStates."""
        return self._exchange.fetch(microbatches)

    def take_reports(self) -> list[dict[str, Tensor]]:
        """See HiddenStates."""
        reports, self._reports = self._reports, []
        return reports

    def forward(self, chunk: Any, item: StudentInput) -> Tensor:
        """See HiddenStates."""
        with self.student_outputs.record() as outputs:
            output = run_chunk(chunk, item.microbatch)
        if outputs.keys() != self.student_outputs.layers_in(chunk.module):
            raise RuntimeError(
                "a layer of distill.hidden_states ran without being recorded: something replaces "
                "the forward pass of layers"
            )
        return self._add_losses(output, chunk.module, outputs, item) if outputs else output

    def _add_losses(
        self, output: Tensor, model: GPTModel, layers: Mapping[int, Tensor], item: StudentInput
    ) -> Tensor:
        """Return a chunk's output, with the gradients of its pairs in the graph where there is one.

        Args:
            output: of the chunk.
            model: the chunk's model.
            layers: outputs [S, B, Hs] of its student layers.
            item: the microbatch, with the teacher's layers.
        """
        training, mask = torch.is_grad_enabled(), self._mask(item.microbatch)
        projections = projections_on(model)
        layer_gradients: dict[int, Tensor] = {}
        weight_gradients: dict[str, Tensor] = {}
        for pair in (pair for pair in self.pairs if pair.student_layer in layers):
            hidden = layers[pair.student_layer].detach().requires_grad_(training)
            projection = projections.get(pair.projection)
            states = hidden if projection is None else projection(hidden)
            losses = pair.distance(states, item.teacher_layers[pair.teacher_layer])
            loss_sum = pair.weight * (losses * mask).sum()
            self._report(loss_sum, mask.sum() if pair.counts else mask.new_zeros(()))
            if training:
                weights = [] if projection is None else list(projection.parameters())
                gradient, *others = torch.autograd.grad(loss_sum, [hidden, *weights])
                _accumulate(layer_gradients, pair.student_layer, gradient)
                for weight_gradient in others:
                    _accumulate(weight_gradients, pair.projection, weight_gradient)
        for layer, gradient in layer_gradients.items():
            layers[layer].register_hook(partial(torch.add, gradient))
        if not weight_gradients:
            return output
        weights = [weight for name in weight_gradients for weight in projections[name].parameters()]
        return _with_gradients(output, weights, list(weight_gradients.values()))

    def _mask(self, microbatch: Microbatch) -> Tensor:
        """Return fp32 [S, B], the loss mask of this rank's slice of the tokens."""
        mask = microbatch.loss_mask.t()
        if not self._sequence_parallel:
            return mask
        return mask.chunk(self._groups.tensor_size)[self._groups.tensor_rank]

    def _report(self, loss_sum: Tensor, count: Tensor) -> None:
        if self._reporting:
            total = loss_sum.detach()
            self._reports.append(
                {
                    "hidden_loss": torch.stack([total, count]),
                    "total_loss": torch.stack([total, torch.zeros_like(total)]),
                }
            )


def _accumulate(sums: dict[Any, Tensor], name: Any, gradient: Tensor) -> None:
    sums[name] = sums[name] + gradient if name in sums else gradient


def _with_gradients(
    output: Tensor, weights: Sequence[Tensor], gradients: Sequence[Tensor]
) -> Tensor:
    """Return `output`, whose backward pass gives the weights their gradients."""
    connected: Tensor = _KnownGradients.apply(output, *weights, *gradients)
    # The pipeline schedule frees what it has sent on, which it cannot do to a view.
    viewless: Tensor = make_viewless_tensor(connected, requires_grad=True, keep_graph=True)
    return viewless


class _KnownGradients(torch.autograd.Function):
    """Return the output; in the backward pass the weights get gradients that are known already."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *weights_and_gradients: Tensor) -> Tensor:
        ctx.save_for_backward(*weights_and_gradients[len(weights_and_gradients) // 2 :])
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        known = ctx.saved_tensors
        return (gradient, *known, *[None] * len(known))


def build_hidden_states(
    config: RunConfig, student: Student, teacher: Teacher, groups: Groups
) -> HiddenStates:
    """Build what distill.hidden_states asks for.

    Args:
        config: the run.
        student: the model that learns.
        teacher: of the run.
        groups: of the student.

    Raises:
        ConfigError: on every rank, if layers are placed unevenly.

    Collectives:
        Over the world, if it asks for anything.
    """
    if not config.distill.hidden_states:
        return NoHiddenStates()
    assert teacher.layers is not None
    pairs = _layer_pairs(config, teacher.layers.num_layers, groups.pipeline_size)
    loss = HiddenStatesLoss(pairs, student, teacher.layers, groups)
    _check_placement(pairs, loss.student_outputs, teacher.layers, groups)
    return loss


def _layer_pairs(config: RunConfig, teacher_layers: int, pipeline: int) -> list[LayerPair]:
    """Return the pairs of distill.hidden_states, with the pipeline stages of their layers."""
    student_layers, virtual = config.model.num_layers, config.parallel.virtual_pipeline
    return [
        LayerPair(
            student_layer=entry.student_layer,
            teacher_layer=entry.teacher_layer,
            distance=HIDDEN_DISTANCES[entry.loss],
            weight=entry.weight,
            stages=(
                stage_of_layer(entry.teacher_layer, teacher_layers, pipeline=pipeline),
                stage_of_layer(
                    entry.student_layer, student_layers, pipeline=pipeline, virtual=virtual
                ),
            ),
            counts=number == 0,
        )
        for number, entry in enumerate(config.distill.hidden_states)
    ]


def _check_placement(
    pairs: Sequence[LayerPair],
    student_outputs: LayerOutputs,
    teacher_layers: TeacherLayers,
    groups: Groups,
) -> None:
    """Check that layers are on the stages where they are expected.

    Args:
        pairs: what is compared.
        student_outputs: of the student's layers on this rank.
        teacher_layers: of the teacher's layers on this rank.
        groups: of the student.

    Raises:
        ConfigError: on every rank, if [model.mcore] places layers unevenly.
    """
    stage = groups.pipeline_rank
    expected = (
        {pair.teacher_layer for pair in pairs if pair.stages[0] == stage},
        {pair.student_layer for pair in pairs if pair.stages[1] == stage},
    )
    problem = None
    if (teacher_layers.layers_on_rank, student_outputs.local_layers) != expected:
        problem = (
            "distill.hidden_states needs pipeline stages of equally many layers: remove what "
            "places them otherwise from [model.mcore]"
        )
    raise_together(problem, ConfigError)
