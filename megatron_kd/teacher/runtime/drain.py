"""Run a live teacher for the next step while the student's pipeline drains.

The teacher is frozen and its targets depend on the samples alone, so the time at which they are
computed changes no bit of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from megatron_kd.data.batches import Microbatch
from megatron_kd.targets import Target
from megatron_kd.teacher.teacher import Teacher


@dataclass
class _ComingStep:
    """Hold a coming step's microbatches in CPU memory, and its targets once they are computed."""

    step: int
    upcoming: Future[list[Microbatch]]
    targets: list[Target | None] | None = None


class DrainTeacher(Teacher):
    """Compute the targets of a prefetched step in `on_drained`, and any others when asked for."""

    def __init__(self, model: Teacher, device: torch.device) -> None:
        self.model, self._device = model, device
        self._coming: _ComingStep | None = None

    def prefetch(self, upcoming: Future[list[Microbatch]] | None, *, step: int) -> None:
        """Note the microbatches that `on_drained` computes targets for. See Teacher."""
        self._coming = None if upcoming is None else _ComingStep(step, upcoming)

    def on_drained(self) -> None:
        """Compute the targets of the coming step. Collective as `targets` of the model is."""
        if self._coming is not None:
            microbatches = [
                microbatch.to(self._device) for microbatch in self._coming.upcoming.result()
            ]
            self._coming.targets = self.model.targets(microbatches)

    def targets(
        self, microbatches: Sequence[Microbatch], *, step: int | None = None
    ) -> list[Target | None]:
        """See Teacher."""
        coming = self._coming
        if step is not None and coming is not None and coming.step == step:
            self._coming = None
            if coming.targets is not None:
                return coming.targets
        return self.model.targets(microbatches, step=step)

    def local_work(self, microbatches: Sequence[Microbatch]) -> tuple[Teacher, list[Microbatch]]:
        """See Teacher."""
        return self.model.local_work(microbatches)
