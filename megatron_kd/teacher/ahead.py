"""A live teacher one step ahead: the targets of the next step are made while the student's pipeline drains.

The teacher is frozen and its targets depend on the samples alone, so that when they are made changes no bit of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_kd.data.batches import Microbatch
from megatron_kd.targets import Target
from megatron_kd.teacher.source import TeacherSource


class AheadTeacher:
    """TeacherSource: what `look_ahead` made is handed out when it is asked for; anything else is made at once."""

    def __init__(self, inner: TeacherSource) -> None:
        self.inner = inner
        self._ready: tuple[Sequence[Microbatch], list[Target | None]] | None = None

    def targets(self, microbatches: Sequence[Microbatch]) -> list[Target | None]:
        """See TeacherSource."""
        if self._ready is not None and self._ready[0] is microbatches:
            found = self._ready[1]
            self._ready = None
            return found
        return self.inner.targets(microbatches)

    def look_ahead(self, microbatches: Sequence[Microbatch]) -> None:
        """Make the targets of microbatches that `targets` will be asked for next: this very list. Collective as `targets` is."""
        self._ready = (microbatches, self.inner.targets(microbatches))
