"""How long a step with a live teacher takes, by where the teacher's forward pass stands in it: pipeline bubbles counted, nothing else.

Times are in any one unit: model FLOPs of a rank do, since only their relation decides. A student in p stages with m microbatches of f
(forward) and b (backward) on a stage takes (m + (p - 1) / v) (f + b) with v virtual stages (Narayanan et al., arXiv 2104.04473, 2.2):
stage s begins s f / v late and is done s b / v before stage 0 is. A forward-only pipeline takes (m + p - 1) f.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """One model over the ranks. Ranks are numbered tensor fastest, then data, then pipeline.

    microbatches: of one replica in a step. forward, backward: time of one microbatch on one pipeline stage (all its virtual ones).
    """

    world_size: int
    tensor: int
    pipeline: int
    microbatches: int
    forward: float
    backward: float = 0.0
    virtual: int = 1

    @property
    def alone(self) -> float:
        """Time of the whole pipeline from first to last, with its bubbles."""
        return (self.microbatches + (self.pipeline - 1) / self.virtual) * (
            self.forward + self.backward
        )

    def stage(self, rank: int) -> int:
        """The pipeline stage of a rank."""
        return rank * self.pipeline // self.world_size

    def replicas(self) -> list[list[list[int]]]:
        """Of each replica, of each stage: its ranks."""
        per_stage = self.world_size // self.pipeline
        firsts = range(0, per_stage, self.tensor)
        return [
            [
                list(range(stage * per_stage + first, stage * per_stage + first + self.tensor))
                for stage in range(self.pipeline)
            ]
            for first in firsts
        ]


@dataclass(frozen=True)
class Placement:
    """When the teacher runs: before the student's step, or of the next one while the student's pipeline drains.

    reverse: its first stage on the ranks of the last, which fall idle first.
    """

    ahead: bool = False
    reverse: bool = False


def step_time(student: Work, teacher: Work, placement: Placement, *, same_layout: bool) -> float:
    """Time of a step. same_layout: targets stay where they are made; else an exchange over the world holds all ranks up together."""
    if placement.ahead:
        return _ahead(student, teacher, placement.reverse)
    if not same_layout:
        return teacher.alone + student.alone
    # Nobody waits for all: the teacher's last stages are still at work while the student's first ones begin.
    fill = (student.pipeline - 1) * max(teacher.forward, student.forward / student.virtual)
    drain = (student.pipeline - 1) * student.backward / student.virtual
    return (
        teacher.microbatches * teacher.forward
        + fill
        + student.microbatches * (student.forward + student.backward)
        + drain
    )


def _ahead(student: Work, teacher: Work, reverse: bool) -> float:
    idle = [
        student.alone - student.stage(rank) * student.backward / student.virtual
        for rank in range(student.world_size)
    ]
    last = 0.0
    for stages in teacher.replicas():
        arrives = [0.0] * teacher.microbatches
        for ranks in reversed(stages) if reverse else stages:
            free = max(idle[rank] for rank in ranks)
            for number, ready in enumerate(arrives):
                free = arrives[number] = max(free, ready) + teacher.forward
        last = max(last, arrives[-1])
    return max(last, student.alone)


def best_placement(
    student: Work, teacher: Work, *, same_layout: bool, can_reverse: bool, gain: float
) -> Placement:
    """The placement of the shortest step; `before`, the plain one, unless another saves at least the share `gain` of it."""
    plain = step_time(student, teacher, Placement(), same_layout=same_layout)
    others = [
        Placement(ahead=True, reverse=reverse)
        for reverse in ((False, True) if can_reverse and teacher.pipeline > 1 else (False,))
    ]
    best = min(others, key=lambda each: step_time(student, teacher, each, same_layout=same_layout))
    return (
        best
        if step_time(student, teacher, best, same_layout=same_layout) < (1 - gain) * plain
        else Placement()
    )
