"""The model of a step with a live teacher against schedules drawn by hand, and what it chooses."""

from __future__ import annotations

import pytest

from megatron_kd.planning.placement import Placement, Work, best_placement, step_time

BEFORE, AHEAD, REVERSED = Placement(), Placement(ahead=True), Placement(ahead=True, reverse=True)


def work(
    pipeline: int,
    microbatches: int,
    forward: float,
    backward: float = 0.0,
    *,
    world: int = 2,
    tensor: int = 1,
    virtual: int = 1,
) -> Work:
    return Work(world, tensor, pipeline, microbatches, forward, backward, virtual)


@pytest.mark.parametrize(
    ("placement", "same_layout", "wanted"),
    [
        # Two stages, two microbatches: student 1 + 2 each, teacher 4. Student alone: 3 rounds of 3 = 9; teacher alone: 3 x 4 = 12.
        (BEFORE, False, 21),
        # Stage 1 begins its student at 12 and not at 9, when its last teacher's microbatch is done: 8 + 4 + 2 x 3 + 2.
        (BEFORE, True, 20),
        # Stage 0 is done at 9, works on the teacher to 17, its last stage from 13 to 21.
        (AHEAD, True, 21),
        # Rank 1 is free at 7 and hands the first microbatch over at 11: rank 0 works 11 .. 19.
        (REVERSED, True, 19),
        (REVERSED, False, 19),
    ],
)
def test_two_stages_by_hand(placement: Placement, same_layout: bool, wanted: float) -> None:
    assert step_time(work(2, 2, 1, 2), work(2, 2, 4), placement, same_layout=same_layout) == wanted


def test_four_stages_by_hand() -> None:
    """Teacher of two stages over four ranks in four student stages: replicas {0, 2}, {1, 3}; idle from 21 - 2 s."""
    student, teacher = work(4, 4, 1, 2, world=4), work(2, 1, 3, world=4)
    assert student.alone == 21
    # Reversed: {1, 3}: rank 3 at 15 .. 18, rank 1 at 19 .. 22; {0, 2}: rank 2 at 17 .. 20, rank 0 at 21 .. 24.
    assert step_time(student, teacher, REVERSED, same_layout=False) == 24
    # A teacher's tensor group waits for its last rank: {2, 3} 17 .. 20, {0, 1} 21 .. 24.
    assert step_time(student, work(2, 1, 3, world=4, tensor=2), REVERSED, same_layout=False) == 24
    assert step_time(student, work(1, 2, 3, world=4, tensor=4), AHEAD, same_layout=False) == 27


def test_virtual_stages_shorten_the_bubble() -> None:
    assert work(4, 4, 1, 2, world=4, virtual=2).alone == (4 + 3 / 2) * 3


@pytest.mark.parametrize(
    ("student", "teacher", "same_layout", "can_reverse", "wanted"),
    [
        (work(2, 2, 1, 2), work(2, 2, 4), True, True, REVERSED),
        (work(2, 2, 1, 2), work(2, 2, 4), True, False, BEFORE),
        (
            work(2, 2, 1, 2),
            work(2, 2, 0.5),
            True,
            True,
            BEFORE,
        ),  # a small teacher hides in the student's own bubble
        (work(1, 4, 1, 2), work(2, 4, 4), False, True, BEFORE),  # nothing drains
        (work(2, 100, 1, 2), work(2, 100, 4), True, True, BEFORE),  # less than the share asked for
        (
            work(2, 2, 1, 2),
            work(1, 1, 4, tensor=2),
            False,
            True,
            BEFORE,
        ),  # its ranks wait for each other anyway
    ],
)
def test_what_is_chosen(
    student: Work, teacher: Work, same_layout: bool, can_reverse: bool, wanted: Placement
) -> None:
    assert (
        best_placement(
            student, teacher, same_layout=same_layout, can_reverse=can_reverse, gain=0.01
        )
        == wanted
    )
