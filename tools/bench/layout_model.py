"""Model the idle share of pipelines in the steps that bench_layout times."""

from __future__ import annotations

import argparse
from typing import NamedTuple

from megatron_kd.planning.placement import PipelineWork, Placement, placed_step_time


class BenchLayout(NamedTuple):
    """Hold the tensor, pipeline and virtual pipeline sizes of one model."""

    tensor: int
    pipeline: int
    virtual: int = 1

    def __str__(self) -> str:
        return f"{self.tensor}x{self.pipeline}" + (f"x{self.virtual}" if self.virtual > 1 else "")


class StepModel:
    """Compute bubbles and seconds of a step by the pipeline schedules alone."""

    def __init__(self, arguments: argparse.Namespace, world: int, student: BenchLayout) -> None:
        self.student = student
        self._world = world
        self._batch = arguments.batch
        self._micro_batch = arguments.micro_batch
        self._teacher_micro_batch = arguments.teacher_micro_batch or arguments.micro_batch

    def student_bubble(self) -> float:
        """Return the idle share of a student's step."""
        microbatches = self._microbatches(self.student, self._micro_batch)
        return 1 - microbatches / self._slots(self.student, self._micro_batch)

    def teacher_bubble(self, teacher: BenchLayout | None) -> float:
        """Return the idle share of the teacher's forward; None is the student's layout."""
        layout, micro_batch = self._teacher(teacher)
        return 1 - self._microbatches(layout, micro_batch) / self._slots(layout, micro_batch)

    def online_step(
        self,
        teacher: BenchLayout | None,
        seconds: tuple[float, float],
        prefetch: bool,
        reverse: bool,
    ) -> tuple[float, float]:
        """Compute an online step from the seconds of its two parts.

        Args:
            teacher: Layout of the teacher; None is the student's.
            seconds: Seconds of a plain step and of a bare teacher forward.
            prefetch: The teacher works one step ahead.
            reverse: The teacher's stages are in reverse order.

        Returns:
            Seconds of the step, and its idle share.
        """
        layout, micro_batch = self._teacher(teacher)
        student_rounds = self._microbatches(self.student, self._micro_batch)
        teacher_rounds = self._microbatches(layout, micro_batch)
        # A backward pass takes as long as two forward passes.
        unit = seconds[0] / self._slots(self.student, self._micro_batch) / 3
        forward = seconds[1] / self._slots(layout, micro_batch)
        student_work = PipelineWork(
            self._world,
            self.student.tensor,
            self.student.pipeline,
            int(student_rounds),
            unit,
            2 * unit,
            self.student.virtual,
        )
        teacher_work = PipelineWork(
            self._world, layout.tensor, layout.pipeline, int(teacher_rounds), forward
        )
        same_layout = teacher is None and not reverse
        modelled = placed_step_time(
            student_work, teacher_work, Placement(prefetch, reverse), same_layout=same_layout
        )
        return modelled, 1 - (student_rounds * 3 * unit + teacher_rounds * forward) / modelled

    def _teacher(self, teacher: BenchLayout | None) -> tuple[BenchLayout, int]:
        """Return layout and microbatch of the teacher, which runs forward only."""
        if teacher is None:
            return self.student._replace(virtual=1), self._micro_batch
        return teacher._replace(virtual=1), self._teacher_micro_batch

    def _microbatches(self, layout: BenchLayout, micro_batch: int) -> float:
        """Return the microbatches of each data-parallel replica."""
        return self._batch * layout.tensor * layout.pipeline / (micro_batch * self._world)

    def _slots(self, layout: BenchLayout, micro_batch: int) -> float:
        """Return the time of a pipeline in units of one microbatch on one stage."""
        ramp = (layout.pipeline - 1) / layout.virtual
        return self._microbatches(layout, micro_batch) + ramp
