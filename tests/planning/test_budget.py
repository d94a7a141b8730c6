"""The cost of a live and of a cached teacher, counted by hand.

A step takes 3 s with a live teacher and 1 s with a cached one; the teacher alone takes 3.5 s.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_kd.planning.reports.budget import Prices, StepSeconds, TrainingPlan, make_budget
from tests.planning.cases import CLUSTER as SMALL_CLUSTER

SECONDS = StepSeconds(tokens=1000, online=3.0, teacher=2.0, cached=1.0, extraction=3.5)
CLUSTER = replace(SMALL_CLUSTER, ranks=10, gpus_per_node=5)
TRAINING = TrainingPlan(tokens=3.6e6, students=4, bytes_per_token=70.0, readers=2)


def test_hours_and_bytes() -> None:
    budget = make_budget(SECONDS, CLUSTER, TRAINING, Prices())
    assert budget.steps == 3600
    assert budget.online_hours == 30
    assert budget.cached_hours == 10
    assert budget.extraction_hours == 35
    assert budget.cache_bytes == 70 * 3.6e6
    assert budget.read_bandwidth == 2 * 70_000
    assert budget.read_bandwidth_per_node == 70_000
    assert budget.online_cost is None


def test_two_students_break_even_in_hours() -> None:
    assert make_budget(SECONDS, CLUSTER, TRAINING, Prices()).break_even == 2


def test_expensive_storage_delays_the_break_even_point() -> None:
    tib_months = 70 * 3.6e6 / 2**40 * 3600 * (3.5 + 4) / (30 * 86400)
    budget = make_budget(SECONDS, CLUSTER, TRAINING, Prices(2.0, 30 / tib_months))
    assert budget.online_cost == 240
    assert budget.cached_cost == pytest.approx(2 * 75 + 30)
    assert budget.break_even == 3


def test_a_cache_that_is_slower_never_pays() -> None:
    training = TrainingPlan(tokens=1e6, students=1, bytes_per_token=70.0, readers=1)
    budget = make_budget(replace(SECONDS, cached=3.5), CLUSTER, training, Prices())
    assert budget.break_even is None
