"""Pairs of layers whose hidden states are compared: entries of `distill.hidden_states`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from pydantic import Field

from megatron_kd.config.model_section import ModelSection, Section


class HiddenStatesPair(Section):
    """One student layer and the teacher layer that it is compared with."""

    student_layer: int = Field(
        gt=0, description="Layer of the student, counted from 1: what it puts out."
    )
    teacher_layer: int = Field(gt=0, description="Layer of the teacher, counted from 1.")
    loss: Literal["mse", "cosine"] = Field(
        default="mse",
        description="mse: mean over the width of the squared difference; cosine: 1 - cos.",
    )
    weight: float = Field(
        gt=0,
        description="What its loss of a token is multiplied by before it is added to the token's total, > 0.",
    )


class Projection(NamedTuple):
    """A learned matrix from the width of a student layer to that of a teacher layer; the losses of one pair of layers share it."""

    student_layer: int
    teacher_layer: int
    teacher_width: int

    @property
    def name(self) -> str:
        """Of its module, and so of its weight in checkpoints and of its initial values."""
        return f"student{self.student_layer}_teacher{self.teacher_layer}"


def projections_of(
    pairs: Iterable[HiddenStatesPair], student: ModelSection, teacher: ModelSection
) -> tuple[Projection, ...]:
    """The projections that the pairs need: none where the models are of one width."""
    if student.hidden_size == teacher.hidden_size:
        return ()
    return tuple(
        sorted(
            {
                Projection(pair.student_layer, pair.teacher_layer, teacher.hidden_size)
                for pair in pairs
            }
        )
    )


def pair_problems(pairs: Sequence[HiddenStatesPair], model: ModelSection) -> list[str]:
    """What is wrong with the pairs for this student, one sentence each."""
    found = [
        f"distill.hidden_states names student_layer {pair.student_layer}, but model.num_layers is {model.num_layers}"
        for pair in pairs
        if pair.student_layer > model.num_layers
    ]
    names = [(pair.student_layer, pair.teacher_layer, pair.loss) for pair in pairs]
    for student, teacher, loss in sorted({name for name in names if names.count(name) > 1}):
        found.append(
            f"distill.hidden_states compares student_layer {student} with teacher_layer {teacher} by {loss} more than once: "
            "keep one entry, with the sum of the weights"
        )
    if model.mcore.get("recompute_granularity") == "full":
        found.append(
            'distill.hidden_states cannot see layers that are recomputed in groups: set model.recompute = "full" in place of '
            "model.mcore.recompute_granularity"
        )
    for name in (
        name
        for name, value in model.mcore.items()
        if "cuda_graph" in name and value not in (False, "none")
    ):
        found.append(
            f"distill.hidden_states cannot see layers that a CUDA graph replays: remove model.mcore.{name}"
        )
    return found
