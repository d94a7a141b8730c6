"""Check pairs of layers whose hidden states are compared, and derive the projections they need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from megatron_kd.config.sections.hidden_states_pair import HiddenStatesPair
from megatron_kd.config.sections.model_section import ModelSection


class Projection(NamedTuple):
    """Describe a learned matrix from the width of a student layer to that of a teacher layer.

    All losses of one pair of layers share it.
    """

    student_layer: int
    teacher_layer: int
    teacher_width: int

    @property
    def name(self) -> str:
        """Return the module name, which checkpoints and the initialisation of its weight use."""
        return f"student{self.student_layer}_teacher{self.teacher_layer}"


def projections_of(
    pairs: Iterable[HiddenStatesPair], student: ModelSection, teacher: ModelSection
) -> tuple[Projection, ...]:
    """Return the projections that the pairs need; none where both models have the same width."""
    if student.hidden_size == teacher.hidden_size:
        return ()
    width = teacher.hidden_size
    projections = {Projection(pair.student_layer, pair.teacher_layer, width) for pair in pairs}
    return tuple(sorted(projections))


def pair_problems(pairs: Sequence[HiddenStatesPair], model: ModelSection) -> list[str]:
    """Return one sentence for each reason why the pairs cannot be used with this student."""
    return [
        *_missing_layers(pairs, model),
        *_duplicate_pairs(pairs),
        *_unobservable_layers(model),
    ]


def _missing_layers(pairs: Sequence[HiddenStatesPair], model: ModelSection) -> list[str]:
    return [
        f"distill.hidden_states names student_layer {pair.student_layer}, but model.num_layers is "
        f"{model.num_layers}"
        for pair in pairs
        if pair.student_layer > model.num_layers
    ]


def _duplicate_pairs(pairs: Sequence[HiddenStatesPair]) -> list[str]:
    keys = [(pair.student_layer, pair.teacher_layer, pair.loss) for pair in pairs]
    return [
        f"distill.hidden_states compares student_layer {student} with teacher_layer {teacher} by "
        f"{loss} more than once: keep one entry, with the sum of the weights"
        for student, teacher, loss in sorted({key for key in keys if keys.count(key) > 1})
    ]


def _unobservable_layers(model: ModelSection) -> list[str]:
    """Return settings of megatron-core under which forward hooks of a layer do not run."""
    problems = []
    if model.mcore.get("recompute_granularity") == "full":
        problems.append(
            "distill.hidden_states cannot observe layers that are recomputed in groups: set "
            'model.recompute = "full" in place of model.mcore.recompute_granularity'
        )
    problems += [
        f"distill.hidden_states cannot observe layers that a CUDA graph replays: remove "
        f"model.mcore.{name}"
        for name, value in model.mcore.items()
        if "cuda_graph" in name and value not in (False, "none")
    ]
    return problems
