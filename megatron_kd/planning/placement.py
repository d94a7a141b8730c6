"""Decide when in a step a live teacher runs, by a model of pipeline bubbles and nothing else.

Times are in any unit, for example model FLOPs of a rank, because only their relation decides. A
student in p stages with m microbatches of f (forward) and b (backward) on a stage takes
(m + (p - 1) / v) (f + b) with v virtual stages (Narayanan et al., arXiv 2104.04473, 2.2): stage s
begins s f / v late and ends s b / v before stage 0. A forward-only pipeline takes (m + p - 1) f.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PipelineWork:
    """Describe one model's pipeline over the ranks, numbered tensor fastest, then data, pipeline.

    Attributes:
        world_size: number of ranks.
        tensor: tensor-parallel size.
        pipeline: number of pipeline stages.
        microbatches: microbatches of one replica in a step.
        forward: time of one microbatch's forward pass on one stage (all its virtual stages).
        backward: the same for the backward pass.
        virtual: virtual stages of each stage.
    """

    world_size: int
    tensor: int
    pipeline: int
    microbatches: int
    forward: float
    backward: float = 0.0
    virtual: int = 1

    @property
    def duration(self) -> float:
        """Return the time of the pipeline from first to last, with its bubbles."""
        rounds = self.microbatches + (self.pipeline - 1) / self.virtual
        return rounds * (self.forward + self.backward)

    def stage(self, rank: int) -> int:
        """Return the pipeline stage of a rank."""
        return rank * self.pipeline // self.world_size

    def replicas(self) -> list[list[list[int]]]:
        """Return the ranks of each stage of each replica."""
        per_stage = self.world_size // self.pipeline
        return [
            [
                list(range(stage * per_stage + first, stage * per_stage + first + self.tensor))
                for stage in range(self.pipeline)
            ]
            for first in range(0, per_stage, self.tensor)
        ]


@dataclass(frozen=True)
class Placement:
    """Say when the teacher runs.

    Attributes:
        prefetch: run it for the next step, while the student's pipeline drains; otherwise before
            the student's step.
        reverse: put its first stage on the ranks of the last one, which become idle first.
    """

    prefetch: bool = False
    reverse: bool = False


def placed_step_time(
    student: PipelineWork, teacher: PipelineWork, placement: Placement, *, same_layout: bool
) -> float:
    """Return the time of a step with the teacher at a placement.

    Args:
        student: pipeline of the student.
        teacher: forward-only pipeline of the teacher over the same ranks.
        placement: when the teacher runs.
        same_layout: targets stay on the ranks that make them. Otherwise an exchange over the world
            makes all ranks wait for each other.
    """
    if placement.prefetch:
        return _prefetched_step_time(student, teacher, reverse=placement.reverse)
    if not same_layout:
        return teacher.duration + student.duration
    # No rank waits for all the others: the teacher's last stages are still working while the
    # student's first ones begin.
    fill = (student.pipeline - 1) * max(teacher.forward, student.forward / student.virtual)
    drain = (student.pipeline - 1) * student.backward / student.virtual
    return (
        teacher.microbatches * teacher.forward
        + fill
        + student.microbatches * (student.forward + student.backward)
        + drain
    )


def _prefetched_step_time(student: PipelineWork, teacher: PipelineWork, *, reverse: bool) -> float:
    idle_from = [
        student.duration - student.stage(rank) * student.backward / student.virtual
        for rank in range(student.world_size)
    ]
    end = 0.0
    for stages in teacher.replicas():
        arrivals = [0.0] * teacher.microbatches
        for ranks in reversed(stages) if reverse else stages:
            time = max(idle_from[rank] for rank in ranks)
            for number, arrival in enumerate(arrivals):
                time = arrivals[number] = max(time, arrival) + teacher.forward
        end = max(end, arrivals[-1])
    return max(end, student.duration)


def best_placement(
    student: PipelineWork,
    teacher: PipelineWork,
    *,
    same_layout: bool,
    can_reverse: bool,
    gain: float,
) -> Placement:
    """Return the placement of the shortest step.

    Args:
        student: pipeline of the student.
        teacher: forward-only pipeline of the teacher.
        same_layout: see `placed_step_time`.
        can_reverse: the teacher's stages may be put on the ranks in reversed order.
        gain: share of the plain step's time that another placement must save to be chosen.

    Returns:
        The plain placement, before the student's step, unless another one saves enough.
    """

    def time(placement: Placement) -> float:
        return placed_step_time(student, teacher, placement, same_layout=same_layout)

    orders = (False, True) if can_reverse and teacher.pipeline > 1 else (False,)
    best = min((Placement(prefetch=True, reverse=reverse) for reverse in orders), key=time)
    return best if time(best) < (1 - gain) * time(Placement()) else Placement()
