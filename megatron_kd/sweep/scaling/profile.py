"""How far a coefficient can move while the others make up for it.

Where coefficients are nearly exchangeable, fits to resampled points stay near the minimum that they begin from and say too little of how
far the valley goes. So the ends of such an interval are tested: the coefficient is held there and the others are fitted again; while
that costs no more than chance would, the end moves on. The yardstick is the likelihood-ratio test of an M-estimator,
2 Delta E[psi'] / E[psi^2] ~ t^2 with P - F degrees of freedom, residuals taken for normal (their median gives sigma).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from megatron_kd.sweep.scaling.forms import (
    BOX,
    Array,
    Problem,
    from_coordinates,
    search,
    to_coordinates,
)

_STEPS, _HALVINGS = 7, 3


def allowance(problem: Problem, y: Array, level: float) -> float:
    """By how much the Huber sum of the best fit may be exceeded, at a probability `level`."""
    from scipy.special import stdtrit

    residual = problem.residuals(y)[0]
    freedom = max(len(residual) - len(y), 1)
    sigma = 1.4826 * float(np.median(np.abs(residual))) * math.sqrt(len(residual) / freedom)
    sigma = max(sigma, 1e-9)
    curvature = math.erf(problem.delta / (sigma * math.sqrt(2))) / problem.delta
    slope = (
        float(np.mean(np.clip(residual / problem.delta, -1.0, 1.0) ** 2)) * len(residual) / freedom
    )
    return float(stdtrit(freedom, (1 + level) / 2)) ** 2 * min(slope, 1.0) / (2 * curvature)


def widen(
    problem: Problem, y: Array, name: str, ends: tuple[float, float], level: float
) -> tuple[float, float]:
    """The interval `ends` of a free coefficient, each end moved outwards for as long as the fit allows it."""
    phi, lowest = problem.coefficients(y)[0], problem.huber(y)[0]
    allowed = lowest + allowance(problem, y, level)
    at = float(phi[problem.names.index(name)])
    low, high = (to_coordinates(name, end) for end in ends)
    step = max(high - low, 1e-3 * max(abs(at), 1.0)) / 2
    reached = [
        _reach(problem, phi, name, end, sign * step, allowed)
        for sign, end in ((-1, min(low, at)), (1, max(high, at)))
    ]
    return float(from_coordinates(name, reached[0])), float(from_coordinates(name, reached[1]))


def _reach(
    problem: Problem, phi: Array, name: str, end: float, step: float, allowed: float
) -> float:
    """The farthest of some values from `end` on, in steps that double, at which the others still fit; `end` itself if none does."""
    state = phi

    def fits(value: float) -> bool:
        nonlocal state
        held = replace(problem, held={**problem.held, name: float(from_coordinates(name, value))})
        cost, found = search(held, [held.coordinates(state)], squares=15, rounds=1)[0]
        if cost <= allowed:
            state = held.coefficients(found)[0]
        return cost <= allowed

    low, high = (
        BOX[name]
        if name in ("E", "gamma", "f1", "d1", "c0")
        else (-60.0, 400.0)
        if name in ("A", "B", "c1")
        else (0.0, 30.0)
    )
    known, beyond = end, None
    if not fits(end):
        return end
    for number in range(_STEPS):
        value = min(max(known + step * 2**number, low), high)
        if value == known:
            return known
        if not fits(value):
            beyond = value
            break
        known = value
    for _ in range(_HALVINGS if beyond is not None else 0):
        assert beyond is not None
        middle = (known + beyond) / 2
        known, beyond = (middle, beyond) if fits(middle) else (known, middle)
    return known
