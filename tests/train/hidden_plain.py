"""Compute the loss of hidden states in plain torch, as a reference for the engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_kd.config import ModelSection
from megatron_kd.losses import reference_kd_cross_entropy
from tests.train.plain import double_target, plain_logits


def hidden_loss(
    pairs: list[dict[str, Any]],
    student: list[Tensor],
    teacher: list[Tensor],
    weights: dict[str, Tensor],
) -> Tensor:
    """Return the loss [B, S] of all pairs, written out by hand.

    Args:
        pairs: Pairs of layers as in the run file.
        student: Output [B, S, H] of each layer of the student.
        teacher: Output [B, S, H] of each layer of the teacher.
        weights: The student's weights, with the projections of pairs of different width.
    """
    total = torch.zeros(student[0].shape[:2], dtype=torch.float64)
    for pair in pairs:
        s, t = student[pair["student_layer"] - 1], teacher[pair["teacher_layer"] - 1]
        layers = f"student{pair['student_layer']}_teacher{pair['teacher_layer']}"
        projection = weights.get(f"hidden_projections.{layers}.weight")
        if projection is not None:
            s = torch.einsum("bsh,th->bst", s, projection)
        mse = ((s - t) ** 2).sum(-1) / t.shape[-1]
        cosine = 1 - (s * t).sum(-1) / ((s**2).sum(-1) * (t**2).sum(-1)).sqrt()
        total = total + pair["weight"] * (cosine if pair.get("loss") == "cosine" else mse)
    return total


class PlainModels:
    """Compute the losses of a step in plain torch, in fp64.

    Args:
        student: Sizes of the student and its weights.
        teacher: Sizes of the teacher and its weights.
        pairs: Pairs of layers to compare.
        alpha: Share of the distillation loss.
    """

    def __init__(
        self,
        student: tuple[ModelSection, dict[str, Tensor]],
        teacher: tuple[ModelSection, dict[str, Tensor]],
        pairs: list[dict[str, Any]],
        alpha: float,
    ) -> None:
        self.student, self.weights = student
        self.teacher, self.teacher_weights = teacher
        self.pairs, self.alpha = pairs, alpha

    def loss_sums(self, batch: list[Any], targets: list[Any]) -> tuple[Tensor, float, float]:
        """Return total loss and loss of hidden states, summed over tokens, and their number."""
        total, hidden, count = torch.zeros((), dtype=torch.float64), 0.0, 0.0
        for (tokens, labels, mask), target in zip(batch, targets, strict=True):
            student_layers: list[Tensor] = []
            teacher_layers: list[Tensor] = []
            logits = plain_logits(self.weights, self.student, tokens, student_layers)
            plain_logits(self.teacher_weights, self.teacher, tokens, teacher_layers)
            loss = reference_kd_cross_entropy(
                logits, labels, double_target(target), alpha=self.alpha, tail="bucket"
            )
            layer_loss = hidden_loss(self.pairs, student_layers, teacher_layers, self.weights)
            hidden_sum = (layer_loss * mask).sum()
            total = total + (loss.total * mask).sum() + hidden_sum
            hidden, count = hidden + float(hidden_sum.detach()), count + float(mask.sum())
        return total, hidden, count
