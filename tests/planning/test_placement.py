"""The model of a step with a live teacher, against schedules drawn by hand, and its choices."""

from __future__ import annotations

import pytest

from megatron_kd.planning.placement import (
    PipelineWork,
    Placement,
    best_placement,
    placed_step_time,
)

BEFORE = Placement()
PREFETCHED = Placement(prefetch=True)
REVERSED = Placement(prefetch=True, reverse=True)


def work(
    pipeline: int, microbatches: int, forward: float, backward: float = 0.0, **layout: int
) -> PipelineWork:
    """Return the work of a pipeline over two ranks; layout: other fields of PipelineWork."""
    fields = {"world_size": 2, "tensor": 1, **layout}
    return PipelineWork(
        pipeline=pipeline,
        microbatches=microbatches,
        forward=forward,
        backward=backward,
        **fields,
    )


@pytest.mark.parametrize(
    ("placement", "same_layout", "seconds"),
    [
        # Two stages, two microbatches: student 1 + 2 each, teacher 4. Student alone: 3 rounds of
        # 3 = 9; teacher alone: 3 x 4 = 12.
        (BEFORE, False, 21),
        # Stage 1 begins its student at 12 and not at 9, when its last teacher's microbatch is
        # done: 8 + 4 + 2 x 3 + 2.
        (BEFORE, True, 20),
        # Stage 0 is done at 9 and works on the teacher to 17, its last stage from 13 to 21.
        (PREFETCHED, True, 21),
        # Rank 1 is free at 7 and hands the first microbatch over at 11: rank 0 works 11 .. 19.
        (REVERSED, True, 19),
        (REVERSED, False, 19),
    ],
)
def test_two_stages_by_hand(placement: Placement, same_layout: bool, seconds: float) -> None:
    student, teacher = work(2, 2, 1, 2), work(2, 2, 4)
    assert placed_step_time(student, teacher, placement, same_layout=same_layout) == seconds


def test_four_stages_by_hand() -> None:
    """A teacher of two stages over four ranks in four student stages.

    Its replicas are {0, 2} and {1, 3}; stage s of the student is idle from 21 - 2 s.
    """
    student = work(4, 4, 1, 2, world_size=4)
    assert student.duration == 21

    def seconds(teacher: PipelineWork, placement: Placement) -> float:
        return placed_step_time(student, teacher, placement, same_layout=False)

    # Reversed: {1, 3}: rank 3 at 15 .. 18, rank 1 at 19 .. 22; {0, 2}: rank 2 at 17 .. 20, rank 0
    # at 21 .. 24.
    assert seconds(work(2, 1, 3, world_size=4), REVERSED) == 24
    # A teacher's tensor group waits for its last rank: {2, 3} 17 .. 20, {0, 1} 21 .. 24.
    assert seconds(work(2, 1, 3, world_size=4, tensor=2), REVERSED) == 24
    assert seconds(work(1, 2, 3, world_size=4, tensor=4), PREFETCHED) == 27


def test_virtual_stages_shorten_the_bubble() -> None:
    assert work(4, 4, 1, 2, world_size=4, virtual=2).duration == (4 + 3 / 2) * 3


@pytest.mark.parametrize(
    ("student", "teacher", "same_layout", "can_reverse", "expected"),
    [
        (work(2, 2, 1, 2), work(2, 2, 4), True, True, REVERSED),
        (work(2, 2, 1, 2), work(2, 2, 4), True, False, BEFORE),
        # A small teacher hides in the student's own bubble.
        (work(2, 2, 1, 2), work(2, 2, 0.5), True, True, BEFORE),
        # One stage has no drain.
        (work(1, 4, 1, 2), work(2, 4, 4), False, True, BEFORE),
        # Less than the required gain.
        (work(2, 100, 1, 2), work(2, 100, 4), True, True, BEFORE),
        # The teacher's ranks wait for each other anyway.
        (work(2, 2, 1, 2), work(1, 1, 4, tensor=2), False, True, BEFORE),
    ],
)
def test_best_placement(
    student: PipelineWork,
    teacher: PipelineWork,
    same_layout: bool,
    can_reverse: bool,
    expected: Placement,
) -> None:
    placement = best_placement(
        student, teacher, same_layout=same_layout, can_reverse=can_reverse, gain=0.01
    )
    assert placement == expected
