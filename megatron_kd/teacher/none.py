"""Pretrain without a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_kd.teacher.source import TeacherInputs, TeacherSource
from megatron_kd.teacher.teacher import Teacher

if TYPE_CHECKING:
    from megatron_kd.data.batches import Microbatch
    from megatron_kd.parallel.groups import Groups
    from megatron_kd.targets import Target


class NoTeacher(Teacher):
    """Give no targets."""

    def targets(
        self, microbatches: Sequence[Microbatch], *, step: int | None = None
    ) -> list[Target | None]:
        """Return None for each microbatch."""
        return [None] * len(microbatches)


class Source(TeacherSource):
    """Source of plain pretraining."""

    def run_fingerprint(self, inputs: TeacherInputs) -> dict[str, Any]:
        """Return nothing: there is no teacher."""
        return {}

    def weights_fingerprint(self, inputs: TeacherInputs) -> dict[str, Any]:
        """Return nothing: there is no teacher."""
        return {}

    def build(self, inputs: TeacherInputs, groups: Groups) -> Teacher:
        """Return a teacher without targets. No collective."""
        return NoTeacher()
