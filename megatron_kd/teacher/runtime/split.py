"""Divide a step's samples between the student's replicas and the teacher's."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple


class SampleRange(NamedTuple):
    """Hold samples start .. stop - 1 of a step that one replica of each model shares.

    Attributes:
        student: replica of the student that trains on them.
        teacher: replica of the teacher that computes their targets.
        start: number of the first sample in the step.
        stop: number after the last sample.
    """

    student: int
    teacher: int
    start: int
    stop: int


@dataclass(frozen=True)
class Split:
    """Assign a step's samples to replicas; they are numbered through the student's replicas.

    Attributes:
        counts: samples of each of the student's replicas.
        teachers: replicas of the teacher, which share the samples evenly.
    """

    counts: tuple[int, ...]
    teachers: int

    @property
    def total(self) -> int:
        """Return the number of samples of the step."""
        return sum(self.counts)

    def of_teacher(self, replica: int) -> range:
        """Return the samples that a replica of the teacher computes."""
        return range(
            replica * self.total // self.teachers, (replica + 1) * self.total // self.teachers
        )

    def of_student(self, replica: int) -> range:
        """Return the samples that a replica of the student trains on."""
        start = sum(self.counts[:replica])
        return range(start, start + self.counts[replica])

    def ranges(self) -> Iterator[SampleRange]:
        """Yield the ranges that a pair of replicas shares, in the order of the samples."""
        student_bounds = list(accumulate(self.counts, initial=0))
        teacher_bounds = [
            replica * self.total // self.teachers for replica in range(self.teachers + 1)
        ]
        # Between neighbouring bounds of either kind; an empty replica begins where the next does.
        for start, stop in pairwise(sorted({*student_bounds, *teacher_bounds})):
            yield SampleRange(
                bisect_right(student_bounds, start) - 1,
                bisect_right(teacher_bounds, start) - 1,
                start,
                stop,
            )
