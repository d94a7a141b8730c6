"""Bring the teacher's layer outputs to the ranks of the student's layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kd.config.hidden_state_pairs import Projection
from megatron_kd.data.batches import Microbatch
from megatron_kd.losses.hidden_state_distances import HiddenDistance
from megatron_kd.parallel.collectives import exchange
from megatron_kd.parallel.groups import Groups
from megatron_kd.teacher.teacher import TeacherLayers


@dataclass(frozen=True)
class LayerPair:
    """Hold one entry of distill.hidden_states.

    Attributes:
        student_layer: number of the student's layer, counted from 1.
        teacher_layer: number of the teacher's layer, counted from 1.
        distance: between their outputs, per token.
        weight: of the pair in the loss.
        stages: pipeline stages of the teacher's layer and of the student's.
        counts: this pair counts the tokens; one of a run does.
    """

    student_layer: int
    teacher_layer: int
    distance: HiddenDistance
    weight: float
    stages: tuple[int, int]
    counts: bool

    @property
    def projection(self) -> str:
        """Return the name of the pair's projection, if it has one."""
        return Projection(self.student_layer, self.teacher_layer, 0).name


class LayerExchange:
    """Exchange layer outputs between pipeline stages.

    One all-to-all over each pipeline group per step, between ranks with equal tensor- and
    data-parallel rank; none if no pair crosses stages.
    """

    def __init__(
        self, teacher_layers: TeacherLayers, pairs: Sequence[LayerPair], groups: Groups
    ) -> None:
        self._teacher_layers, self._groups = teacher_layers, groups
        # (from stage, to stage) -> layers, in an order that both know.
        self._routes: dict[tuple[int, int], list[int]] = {}
        for pair in pairs:
            layers = self._routes.setdefault(pair.stages, [])
            if pair.teacher_layer not in layers:
                layers.append(pair.teacher_layer)
        self._crosses = any(start != end for start, end in self._routes)

    def fetch(self, microbatches: Sequence[Microbatch]) -> list[dict[int, Tensor]]:
        """Return the layer outputs that this rank's student layers are compared with.

        Each dict is of one microbatch and maps a teacher layer to its output [S, B, Ht].

        Collectives:
            One all-to-all over the pipeline group, if a pair crosses stages.
        """
        outputs, stage = self._teacher_layers.take_outputs(), self._groups.pipeline_rank
        local = self._routes.get((stage, stage), [])
        states = [{layer: by_layer[layer] for layer in local} for by_layer in outputs]
        if self._crosses:
            shape = self._teacher_layers.microbatch_shape(microbatches[0].tokens.shape[0])
            for layer, received in self._receive(outputs, shape).items():
                for by_layer, state in zip(states, received, strict=True):
                    by_layer[layer] = state
        return states

    def _receive(
        self, outputs: Sequence[dict[int, Tensor]], shape: tuple[int, int, int]
    ) -> dict[int, Tensor]:
        """Return the layers that come from other stages, each [microbatches, S, B, Ht].

        Args:
            outputs: layer outputs of this stage, of each microbatch.
            shape: [S, B, Ht] of one output.
        """
        stage, step_shape = self._groups.pipeline_rank, (len(outputs), *shape)
        device = self._groups.platform.device
        sends = {
            end: torch.stack([by_layer[layer] for layer in layers for by_layer in outputs])
            for (start, end), layers in self._routes.items()
            if start == stage != end
        }
        incoming = {
            start: layers for (start, end), layers in self._routes.items() if start != stage == end
        }
        size = torch.Size(step_shape).numel()
        received = exchange(
            sends,
            {start: len(layers) * size for start, layers in incoming.items()},
            like=torch.empty(0, dtype=self._teacher_layers.dtype, device=device),
            group=self._groups.collection.pp,
        )
        return {
            layer: state
            for start, layers in incoming.items()
            for layer, state in zip(
                layers, received[start].view(len(layers), *step_shape), strict=True
            )
        }
