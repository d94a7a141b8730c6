"""The formulas of the scaling laws, their derivatives, and what follows from the published ones."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_kd.config import ConfigError
from megatron_kd.sweep.scaling.compute import TrainingFlops, compare, forward_flops
from megatron_kd.sweep.scaling.forms import DISTILLATION_NAMES, SUPERVISED_NAMES
from megatron_kd.sweep.scaling.laws import (
    PUBLISHED_DISTILLATION,
    PUBLISHED_SUPERVISED,
    coordinates_of,
)
from megatron_kd.sweep.scaling.problem import Problem
from tests.losses.cases import fresh_seed
from tests.sweep.scaling_cases import plain_distilled, plain_supervised


def test_laws_are_the_published_formulas() -> None:
    rng = np.random.default_rng(fresh_seed())
    n, d, t = (
        np.exp(rng.uniform(18, 25, (3, 5))),
        np.exp(rng.uniform(20, 28, (3, 5))),
        rng.uniform(1.5, 4, (3, 5)),
    )
    assert np.allclose(PUBLISHED_SUPERVISED.loss(n, d), plain_supervised(n, d), rtol=1e-12)
    assert np.allclose(PUBLISHED_DISTILLATION.loss(n, d, t), plain_distilled(n, d, t), rtol=1e-12)
    assert PUBLISHED_DISTILLATION.loss(1e9, 1e11, np.array([2.0, 2.1])).shape == (2,)


def test_derivatives_of_the_forms() -> None:
    """Derivatives by every free coordinate equal central differences, all free and some held."""
    rng = np.random.default_rng(fresh_seed())
    n, d, t = rng.uniform(18, 24, 9), rng.uniform(21, 27, 9), np.log(rng.uniform(1.6, 3.5, 9))
    loss = np.log(rng.uniform(2, 4, 9))
    for held in (
        {},
        {"gamma": 0.5},
        {"alpha": 0.3, "B": 1e4},
        {"c1": 300.0, "E": 1.1, "c0": 2.0},
        {"f1": 0.1, "d1": 1.2},
    ):
        for names, law in (
            (SUPERVISED_NAMES, PUBLISHED_SUPERVISED),
            (DISTILLATION_NAMES, PUBLISHED_DISTILLATION),
        ):
            law_held = {name: value for name, value in held.items() if name in names}
            extra = (
                ()
                if names is SUPERVISED_NAMES
                else (t, np.log(plain_supervised(np.exp(n), np.exp(d))))
            )
            problem = Problem(n, d, loss, np.ones(9), 1e-4, law_held, *extra)
            y = problem.coordinates(coordinates_of(law)) + rng.normal(0, 0.05, len(problem.free))
            assert np.allclose(problem.coordinates(problem.coefficients(y)[0]), y, atol=1e-9)
            slopes = problem.residuals(y)[1]
            for column, unit in enumerate(1e-6 * np.eye(len(y))):
                numeric = (problem.residuals(y + unit)[0] - problem.residuals(y - unit)[0]) / 2e-6
                assert np.allclose(
                    slopes[:, column], numeric, atol=1e-7 + 1e-5 * np.abs(numeric).max()
                ), problem.free[column]


def test_best_teacher() -> None:
    n, d = 1e9, 1e11
    best = PUBLISHED_DISTILLATION.best_teacher_loss(n, d)
    grid = np.linspace(1.25, 4.0, 20001)
    lowest = int(plain_distilled(n, d, grid).argmin())
    assert abs(best - grid[lowest]) < 1e-3
    assert 0 < lowest < 20000


def test_losses_at_equal_flops() -> None:
    n, d = 1e9, 1e11
    training = TrainingFlops(
        forward_flops(n), forward_flops(8e9), logits=0.25, pretraining=0.5, teacher_tokens=3e11
    )
    flops = 3 * 2e9 * 1e11 + 16e9 * (0.25 * 1e11 + 0.5 * 3 * 3e11)
    comparison = compare(PUBLISHED_DISTILLATION, n, d, 2.1, training)
    assert comparison.flops == pytest.approx(flops)
    assert comparison.equal_flops_tokens == pytest.approx(flops / 6e9)
    assert comparison.equal_flops == pytest.approx(float(plain_supervised(n, flops / 6e9)))
    assert (comparison.distilled, comparison.equal_tokens) == pytest.approx(
        (float(plain_distilled(n, d, 2.1)), float(plain_supervised(n, d)))
    )


@pytest.mark.parametrize("shares", [{"logits": -1.0}, {"pretraining": 1.0}, {"logits": math.nan}])
def test_shares_out_of_range(shares: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        TrainingFlops(1.0, 1.0, **shares)
