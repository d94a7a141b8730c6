"""Which replica of the student trains on a sample of a step, and which replica of the teacher works on it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple


class Range(NamedTuple):
    """Samples start .. stop - 1 of the step that are one student replica's (owner) and one teacher replica's (worker)."""

    owner: int
    worker: int
    start: int
    stop: int


@dataclass(frozen=True)
class Split:
    """Which samples of a step belong to which replica. Samples are counted through the student's replicas, one after the other.

    counts: samples of each of the student's replicas. workers: replicas of the teacher, which share them evenly.
    """

    counts: tuple[int, ...]
    workers: int

    @property
    def total(self) -> int:
        """Samples of the step."""
        return sum(self.counts)

    def worked(self, worker: int) -> range:
        """What a replica of the teacher computes."""
        return range(worker * self.total // self.workers, (worker + 1) * self.total // self.workers)

    def owned(self, owner: int) -> range:
        """What a replica of the student trains on."""
        start = sum(self.counts[:owner])
        return range(start, start + self.counts[owner])

    def ranges(self) -> Iterator[Range]:
        """All pairs of replicas with something in common, in the order of the samples."""
        owners = list(accumulate(self.counts, initial=0))
        workers = [worker * self.total // self.workers for worker in range(self.workers + 1)]
        # Between neighbouring bounds of either kind; a replica without samples begins where the next one does.
        for start, stop in pairwise(sorted({*owners, *workers})):
            yield Range(
                bisect_right(owners, start) - 1, bisect_right(workers, start) - 1, start, stop
            )
