"""Scaling laws fitted to points whose law is known.

Noise differs in every run; the seed is in the message of a failure. `test_coverage` (pytest -m
study, 10 to 20 minutes) counts how often a 95 % interval holds the truth, and records it as its
"measured" property.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest

from megatron_kd.config import ConfigError
from megatron_kd.sweep.scaling.fit import Fit, ScalingPoint, fit_distillation, fit_supervised
from megatron_kd.sweep.scaling.laws import PUBLISHED_SUPERVISED
from tests.losses.cases import fresh_seed
from tests.sweep.scaling_cases import DISTILLED, SUPERVISED, misses, predictions, sample_points


@pytest.fixture(scope="module")
def fits() -> tuple[Fit, Fit, int]:
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    supervised = fit_supervised(
        sample_points(rng, 40, 2e-3, teacher=False), resamples=20, level=0.999
    )
    return (
        supervised,
        fit_distillation(
            sample_points(rng, 60, 2e-3, teacher=True), supervised, resamples=20, level=0.999
        ),
        seed,
    )


def test_published_coefficients_come_back(fits: tuple[Fit, Fit, int]) -> None:
    """Coefficients and predictions are within their intervals.

    Those of predictions are narrow, and the poorly determined coefficients are named.
    """
    supervised, distilled, seed = fits
    assert len(misses(supervised, SUPERVISED)) <= 1, seed
    assert len(misses(distilled, DISTILLED)) <= 1, seed
    assert "c1" in distilled.undetermined(), "an interval of c1 that is narrow is wrong"
    rng = np.random.default_rng(seed)
    for _ in range(4):
        for estimate, truth in predictions(supervised, distilled, rng):
            assert abs(estimate.value - truth) < 0.01 * truth, (seed, estimate, truth)
            assert estimate.high - estimate.low < 0.03 * truth, (seed, estimate, truth)
            half = max(estimate.high - estimate.value, estimate.value - estimate.low)
            assert abs(estimate.value - truth) < 4 * half + 1e-3 * truth, (seed, estimate, truth)


def test_noiseless_points_give_the_coefficients_exactly() -> None:
    """Give identical results: the same points with the same seed also give the same intervals.

    With some coefficients held, fewer points are enough.
    """
    rng = np.random.default_rng(fresh_seed())
    points = sample_points(rng, 16, 0.0, teacher=False)
    first, second = (fit_supervised(points, resamples=20, seed=5) for _ in range(2))
    for name, estimate in first.coefficients().items():
        assert abs(estimate.value / SUPERVISED[name] - 1) < 0.005, (name, estimate)
    assert first.intervals == second.intervals
    assert first.law == second.law
    held = {name: value for name, value in DISTILLED.items() if name not in ("A", "B", "c0")}
    # Six random points, the fewest allowed, do not always tell A from B: all may have a teacher
    # that is too far ahead of them.
    few = fit_distillation(
        sample_points(rng, 12, 0.0, teacher=True), PUBLISHED_SUPERVISED, held=held, resamples=20
    )
    for name, value in DISTILLED.items():
        assert abs(getattr(few.law, name) / value - 1) < (1e-3 if name not in held else 1e-12), name


@pytest.mark.study
@pytest.mark.timeout(3600)
def test_coverage(measured: Callable[[str], None]) -> None:
    """Count how often 95 % intervals of coefficients and of predictions hold the truth.

    Points and noise are sampled again each time.
    """
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    hits = {"coefficients": 0, "predictions": 0}
    trials = {"coefficients": 0, "predictions": 0}
    for number in range(24):
        noise, few = (1e-3, 5e-3, 2e-2)[number % 3], number % 2
        supervised = fit_supervised(
            sample_points(rng, 24 if few else 73, noise, teacher=False), resamples=80, seed=number
        )
        base = supervised if number % 4 < 2 else PUBLISHED_SUPERVISED
        distilled = fit_distillation(
            sample_points(rng, 40 if few else 150, noise, teacher=True),
            base,
            resamples=80,
            seed=number,
        )
        missed = len(misses(supervised, SUPERVISED)) + len(misses(distilled, DISTILLED))
        hits["coefficients"] += 15 - missed
        trials["coefficients"] += 15
        for _ in range(3):
            for estimate, truth in predictions(supervised, distilled, rng):
                hits["predictions"] += estimate.low <= truth <= estimate.high
                trials["predictions"] += 1
    measured(f"{hits} of {trials}, seed {seed}")
    # Misses come together, so the binomial error is too small: 5 points below the nominal rate.
    assert all(hits[kind] >= 0.90 * trials[kind] for kind in hits), (seed, hits, trials)


def test_points_that_cannot_be_fitted() -> None:
    rng = np.random.default_rng(fresh_seed())
    plain, distilled = (
        sample_points(rng, 12, 0.0, teacher=False),
        sample_points(rng, 17, 0.0, teacher=True),
    )
    with pytest.raises(
        ConfigError,
        match="supervised law has 6 coefficients to fit and needs at least 12 runs, "
        "but there are 11",
    ):
        fit_supervised([*plain[1:], *distilled])
    with pytest.raises(
        ConfigError,
        match="distillation law has 9 coefficients to fit and needs at least 18 runs, "
        "but there are 17",
    ):
        fit_distillation([*distilled, *plain], PUBLISHED_SUPERVISED)
    with pytest.raises(ConfigError, match="all runs have the same tokens"):
        fit_supervised([ScalingPoint(point.parameters, 1e10, point.loss) for point in plain])
    with pytest.raises(ConfigError, match="positive, finite"):
        fit_supervised([*plain, ScalingPoint(1e9, 1e10, -1.0)])
    with pytest.raises(ConfigError, match="no coefficient delta"):
        fit_supervised(plain, held={"delta": 1.0})
    with pytest.raises(ConfigError, match="leave some to fit"):
        fit_supervised(plain, held=SUPERVISED)
    with pytest.raises(ConfigError, match="at least 20 resamples"):
        fit_supervised(plain, resamples=3)


def test_scipy_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ConfigError, match=r"needs scipy: pip install 'megatron-kd\[scaling\]'"):
        fit_supervised(sample_points(np.random.default_rng(0), 12, 0.0, teacher=False))
