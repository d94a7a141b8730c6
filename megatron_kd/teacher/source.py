"""The one question a step asks a teacher, whatever stands behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_kd.data.batches import Microbatch
from megatron_kd.targets import Target


class TeacherSource(Protocol):
    """Gives targets for microbatches. The student never learns where they come from."""

    def targets(self, microbatches: Sequence[Microbatch]) -> list[Target | None]:
        """One target per microbatch (sparse: [S, B, K]), the same on every tensor-parallel rank; None off the student's last stage.

        May be collective over the teacher's groups: every rank calls it once per step.
        """
        ...


class NoTeacher:
    """Plain pretraining."""

    def targets(self, microbatches: Sequence[Microbatch]) -> list[Target | None]:
        """None for each."""
        return [None] * len(microbatches)
