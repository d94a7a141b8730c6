"""Compare learning-rate and alpha schedules with values by hand."""

from __future__ import annotations

import math
import random
from typing import get_args

import pytest

from megatron_kd.config.declarations.schedules import ALPHA_SCHEDULES, LEARNING_RATE_SCHEDULES
from megatron_kd.config.sections import DistillSection, OptimizerSection
from megatron_kd.train.schedule_values import alpha_at, learning_rate_at

PEAK, FLOOR = 8e-3, 2e-3
KEYS = ("schedule", "alpha_schedule")


def optimizer(
    schedule: str, *, warmup: int = 0, decay: int = 0, floor: float = FLOOR
) -> OptimizerSection:
    return OptimizerSection(
        learning_rate=PEAK,
        min_learning_rate=floor,
        schedule=schedule,
        warmup_steps=warmup,
        decay_steps=decay,
    )  # type: ignore[arg-type]


def distill(
    schedule: str, *, alpha: float = 0.8, warmup: float = 0.1, decay: float = 0.01
) -> DistillSection:
    return DistillSection(
        alpha=alpha,
        alpha_schedule=schedule,
        alpha_warmup_fraction=warmup,
        alpha_decay_fraction=decay,
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", [*LEARNING_RATE_SCHEDULES])
def test_warm_up_reaches_the_peak_and_does_not_lose_the_first_update(schedule: str) -> None:
    section = optimizer(schedule, warmup=4, decay=2)
    rates = [learning_rate_at(step, 20, section) for step in range(4)]
    assert rates == pytest.approx([PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK], rel=1e-12)
    assert learning_rate_at(0, 20, optimizer(schedule, decay=2)) > 0


def test_linear() -> None:
    section = optimizer("linear", warmup=2)
    # Six updates after warm-up, each a sixth of the way from 8e-3 to 2e-3.
    rates = [learning_rate_at(step, 8, section) for step in range(2, 8)]
    assert rates == pytest.approx([7e-3, 6e-3, 5e-3, 4e-3, 3e-3, 2e-3], rel=1e-12)


def test_cosine() -> None:
    section = optimizer("cosine", warmup=2)
    # Four updates after warm-up: cos of 45, 90, 135 and 180 degrees around the middle, 5e-3, with
    # amplitude 3e-3.
    half = 3e-3 / math.sqrt(2)
    rates = [learning_rate_at(step, 6, section) for step in range(2, 6)]
    assert rates == pytest.approx([5e-3 + half, 5e-3, 5e-3 - half, 2e-3], rel=1e-12)


def test_constant_and_wsd() -> None:
    assert {learning_rate_at(step, 9, optimizer("constant")) for step in range(9)} == {PEAK}
    section = optimizer("wsd", warmup=1, decay=2)
    # One update of warm-up at the peak, then the peak, then two updates of cosine decay: the middle
    # and the floor.
    assert [learning_rate_at(step, 6, section) for step in range(6)] == pytest.approx(
        [PEAK] * 4 + [5e-3, FLOOR], rel=1e-12
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_last_update_is_at_the_floor_and_later_ones_stay_there(schedule: str) -> None:
    section = optimizer(schedule, warmup=3, decay=5)
    for step in (29, 30, 100):
        assert learning_rate_at(step, 30, section) == pytest.approx(FLOOR, rel=1e-12)
    assert learning_rate_at(
        29, 30, optimizer(schedule, warmup=3, decay=5, floor=0.0)
    ) == pytest.approx(0.0, abs=1e-18)
    rates = [learning_rate_at(step, 30, section) for step in range(2, 30)]
    assert rates == sorted(rates, reverse=True)


def test_short_runs_stay_in_warm_up() -> None:
    section = optimizer("cosine", warmup=10)
    assert learning_rate_at(2, 3, section) == pytest.approx(PEAK * 0.3, rel=1e-12)
    assert learning_rate_at(0, 1, optimizer("cosine")) == pytest.approx(FLOOR, rel=1e-12)


def test_alpha_constant_and_linear() -> None:
    assert {alpha_at(step, 5, distill("constant")) for step in range(5)} == {0.8}
    assert [alpha_at(step, 5, distill("linear_up")) for step in range(5)] == pytest.approx(
        [0.0, 0.2, 0.4, 0.6, 0.8], abs=1e-12
    )
    assert [alpha_at(step, 5, distill("linear_down")) for step in range(5)] == pytest.approx(
        [0.8, 0.6, 0.4, 0.2, 0.0], abs=1e-12
    )


def test_alpha_wsd() -> None:
    section = distill("wsd", warmup=0.2, decay=0.2)
    # Of 10 steps, 2 of warm-up, 6 stable, 2 of cosine decay to half and to zero.
    rates = [alpha_at(step, 10, section) for step in range(10)]
    assert rates == pytest.approx([0.4, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.4, 0.0], abs=1e-12)
    assert {alpha_at(step, 10, distill("wsd", warmup=0.0, decay=0.0)) for step in range(10)} == {
        0.8
    }
    halves = [alpha_at(step, 4, distill("wsd", warmup=0.5, decay=0.5)) for step in range(4)]
    assert halves == pytest.approx([0.4, 0.8, 0.4, 0.0], abs=1e-12)


def test_alpha_wsd_on_the_cross_entropy() -> None:
    """Give 1 - alpha the shape, so that distillation is alone at first and at the end."""
    section = distill("wsd_ce", warmup=0.2, decay=0.2)
    rates = [alpha_at(step, 10, section) for step in range(10)]
    assert rates == pytest.approx([0.6, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.6, 1.0], abs=1e-12)


def test_alpha_period() -> None:
    section = distill("period").model_copy(update={"alpha_period_fraction": 0.4})
    assert [alpha_at(step, 10, section) for step in range(10)] == [
        0.8,
        0.8,
        0,
        0,
        0.8,
        0.8,
        0,
        0,
        0.8,
        0.8,
    ]
    one_period = section.model_copy(update={"alpha_period_fraction": 1.0})
    assert [alpha_at(step, 6, one_period) for step in range(6)] == [0.8] * 3 + [0] * 3
    assert [alpha_at(step, 3, section) for step in range(3)] == [0.8, 0, 0.8], (
        "half a period is at least one step"
    )


@pytest.mark.parametrize("schedule", [*ALPHA_SCHEDULES])
def test_alpha_stays_a_weight(schedule: str) -> None:
    """Stay in [0, alpha] for every run length, down to one step."""
    for steps in (1, 2, 3, 7, 100):
        for step in range(steps):
            assert -1e-12 <= alpha_at(step, steps, distill(schedule, alpha=1.0)) <= 1.0, (
                steps,
                step,
            )
    assert alpha_at(0, 1, distill("linear_up")) == 0.0
    assert alpha_at(0, 1, distill("linear_down")) == 0.8


def test_schedules_keep_no_state() -> None:
    """Return the same floats in any order, so that a resumed run needs the step only."""
    cases = [
        (function, step, section)
        for function, section in (
            *(
                (learning_rate_at, optimizer(name, warmup=5, decay=7))
                for name in LEARNING_RATE_SCHEDULES
            ),
            *((alpha_at, distill(name)) for name in ALPHA_SCHEDULES),
        )
        for step in range(40)
    ]
    values = [function(step, 40, section) for function, step, section in cases]  # type: ignore[operator]
    order = list(range(len(cases)))
    random.Random(0).shuffle(order)
    for index in order:
        function, step, section = cases[index]
        assert function(step, 40, section) == values[index]  # type: ignore[operator]


def test_names_of_a_run_file_follow_from_the_registries() -> None:
    assert {"cosine", "linear", "constant", "wsd"} <= LEARNING_RATE_SCHEDULES.keys()
    assert {"constant", "linear_up", "linear_down", "period", "wsd", "wsd_ce"} <= (
        ALPHA_SCHEDULES.keys()
    )
    fields = OptimizerSection.model_fields, DistillSection.model_fields
    names = [get_args(field[key].annotation) for field, key in zip(fields, KEYS, strict=True)]
    assert names == [tuple(LEARNING_RATE_SCHEDULES), tuple(ALPHA_SCHEDULES)]
    assert "wsd: stable, then cosine decay" in str(fields[0]["schedule"].description)
    assert "linear_up: 0 to alpha" in str(fields[1]["alpha_schedule"].description)
