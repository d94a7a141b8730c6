"""Compute intervals of coefficients, from fits to resampled points and from the likelihood.

Where coefficients are nearly exchangeable, fits to resampled points stay near the minimum that they
start from, and their spread is too small. So the ends of such an interval are tested: the
coefficient is held there and the others are fitted again. While that costs no more than chance
would, the end moves on. The criterion is the likelihood-ratio test of an M-estimator,
2 Delta E[psi'] / E[psi^2] ~ t^2 with P - F degrees of freedom. Residuals are taken as normal, and
their median gives sigma.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from megatron_kd.sweep.scaling.forms import Array, from_coordinate, to_coordinate
from megatron_kd.sweep.scaling.problem import BOX, Problem, search_minima

# Steps outwards, each twice as long as the one before, and bisections of the last one.
_STEPS, _BISECTIONS = 7, 3


def expanded_quantiles(level: float, points: int, free: int) -> tuple[float, float]:
    """Return the quantiles of the resampled fits at the ends of an interval.

    They lie farther out than (1 - level) / 2 where points are few: resampling P points sees only
    (P - F) / P of the variance, and no t-distribution (Hesterberg, arXiv 1411.5279).

    Args:
        level: probability of the interval.
        points: number of points P.
        free: number of fitted coefficients F.
    """
    from scipy.special import ndtr, stdtrit

    freedom = max(points - free, 1)
    tail = float(ndtr(-math.sqrt(points / freedom) * stdtrit(freedom, (1 + level) / 2)))
    return tail, 1.0 - tail


def allowance(problem: Problem, y: Array, level: float) -> float:
    """Return by how much the Huber sum of the best fit may be exceeded.

    Args:
        problem: points of a law.
        y: free coordinates of the best fit.
        level: probability of the interval.
    """
    from scipy.special import stdtrit

    residual = problem.residuals(y)[0]
    freedom = max(len(residual) - len(y), 1)
    sigma = 1.4826 * float(np.median(np.abs(residual))) * math.sqrt(len(residual) / freedom)
    sigma = max(sigma, 1e-9)
    curvature = math.erf(problem.delta / (sigma * math.sqrt(2))) / problem.delta
    clipped = np.clip(residual / problem.delta, -1.0, 1.0)
    slope = float(np.mean(clipped**2)) * len(residual) / freedom
    return float(stdtrit(freedom, (1 + level) / 2)) ** 2 * min(slope, 1.0) / (2 * curvature)


def widen_interval(
    problem: Problem, y: Array, name: str, ends: tuple[float, float], level: float
) -> tuple[float, float]:
    """Return an interval of a free coefficient, its ends moved outwards while the fit allows it.

    Args:
        problem: points of a law.
        y: free coordinates of the best fit.
        name: the coefficient.
        ends: its interval from resampled fits.
        level: probability of the interval.
    """
    phi, lowest = problem.coefficients(y)[0], problem.huber(y)[0]
    cost_limit = lowest + allowance(problem, y, level)
    best = float(phi[problem.names.index(name)])
    low, high = (to_coordinate(name, end) for end in ends)
    step = max(high - low, 1e-3 * max(abs(best), 1.0)) / 2
    reached = [
        _Profile(problem, name, cost_limit, phi).farthest(end, sign * step)
        for sign, end in ((-1, min(low, best)), (1, max(high, best)))
    ]
    return float(from_coordinate(name, reached[0])), float(from_coordinate(name, reached[1]))


@dataclass
class _Profile:
    """Test values of one coefficient, each with the others fitted from the last accepted state."""

    problem: Problem
    name: str
    cost_limit: float
    phi: Array

    def fits(self, value: float) -> bool:
        """Return True if the other coefficients can be fitted with this value held."""
        held = {**self.problem.held, self.name: float(from_coordinate(self.name, value))}
        problem = replace(self.problem, held=held)
        start = problem.coordinates(self.phi)
        cost, y = search_minima(problem, [start], least_squares_steps=15, rounds=1)[0]
        if cost <= self.cost_limit:
            self.phi = problem.coefficients(y)[0]
        return cost <= self.cost_limit

    def bounds(self) -> tuple[float, float]:
        """Return the range of the coefficient's coordinate."""
        if self.name in ("E", "gamma", "f1", "d1", "c0"):
            return BOX[self.name]
        return (-60.0, 400.0) if self.name in ("A", "B", "c1") else (0.0, 30.0)

    def farthest(self, end: float, step: float) -> float:
        """Return the farthest tested value from `end` on that fits; `end` itself if none does.

        Args:
            end: coordinate to start from.
            step: signed length of the first step; later ones double.
        """
        low, high = self.bounds()
        accepted, rejected = end, None
        if not self.fits(end):
            return end
        for number in range(_STEPS):
            value = min(max(accepted + step * 2**number, low), high)
            if value == accepted:
                return accepted
            if not self.fits(value):
                rejected = value
                break
            accepted = value
        if rejected is None:
            return accepted
        for _ in range(_BISECTIONS):
            middle = (accepted + rejected) / 2
            accepted, rejected = (middle, rejected) if self.fits(middle) else (accepted, middle)
        return accepted
