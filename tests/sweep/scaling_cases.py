"""Points of the published scaling laws, written without the package, and checks of fits to them."""

from __future__ import annotations

import math

import numpy as np

from megatron_kd.sweep.scaling.fit import Estimate, Fit, ScalingPoint

SUPERVISED = {"E": 1.220, "A": 3355.0, "B": 18186.0, "alpha": 0.408, "beta": 0.431, "gamma": 0.452}
DISTILLED = {
    "A": 2243.0,
    "B": 24181.0,
    "alpha": 0.321,
    "beta": 0.637,
    "gamma": 0.764,
    "c0": 2.549,
    "c1": 522.6,
    "f1": 0.090,
    "d1": 1.315,
}


def plain_supervised(n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Return the published law, written without the package."""
    return 1.220 + (3355.0 / n**0.408 + 18186.0 / d**0.431) ** 0.452


def plain_distilled(n: np.ndarray, d: np.ndarray, t: np.ndarray) -> np.ndarray:
    capacity = (1 + (t / (plain_supervised(n, d) * 1.315)) ** (1 / 0.090)) ** (-522.6 * 0.090)
    return t + t**-2.549 * capacity * (2243.0 / n**0.321 + 24181.0 / d**0.637) ** 0.764


def sample_points(
    rng: np.random.Generator, count: int, noise: float, *, teacher: bool
) -> list[ScalingPoint]:
    """Return runs of the published sizes and budgets with log-normal noise."""
    n, d = (
        np.exp(rng.uniform(math.log(low), math.log(high), count))
        for low, high in ((1.4e8, 1.2e10), (2e9, 5e11))
    )
    t = rng.uniform(1.8, 2.9, count)
    loss = (plain_distilled(n, d, t) if teacher else plain_supervised(n, d)) * np.exp(
        noise * rng.standard_normal(count)
    )
    return [
        ScalingPoint(*map(float, numbers))
        for numbers in np.stack([n, d, loss, t] if teacher else [n, d, loss], axis=1)
    ]


def predictions(
    supervised: Fit, distilled: Fit, rng: np.random.Generator
) -> list[tuple[Estimate, float]]:
    """Return what each fit predicts for a random student and teacher, and the truth."""
    n = float(np.exp(rng.uniform(20.0, 22.5)))
    d = float(np.exp(rng.uniform(23.0, 26.0)))
    t = float(rng.uniform(1.9, 2.6))
    return [
        (supervised.estimate(lambda law: law.loss(n, d)), float(plain_supervised(n, d))),
        (distilled.estimate(lambda law: law.loss(n, d, t)), float(plain_distilled(n, d, t))),
    ]


def misses(fit: Fit, truth: dict[str, float]) -> list[str]:
    """Return the coefficients whose interval does not hold the truth."""
    return [
        name
        for name, estimate in fit.coefficients().items()
        if not estimate.low <= truth[name] <= estimate.high
    ]
