"""Declare one entry of `distill.hidden_states` in a run file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_kd.config.sections.section import Section


class HiddenStatesPair(Section):
    """Compare the output of a student layer with that of a teacher layer."""

    student_layer: int = Field(gt=0)
    """Layer of the student whose output is compared, counted from 1."""
    teacher_layer: int = Field(gt=0)
    """Layer of the teacher, counted from 1."""
    loss: Literal["mse", "cosine"] = "mse"
    """mse: squared difference, averaged over the hidden width. cosine: 1 - cosine similarity."""
    weight: float = Field(gt=0)
    """Factor of this loss in a token's total loss, > 0."""
