"""Fit the coefficients of a scaling law to points by minimising Huber losses.

The coefficients of a law are nearly exchangeable: alpha with gamma, A with alpha, c1 with d1. The
search uses coordinates in which they are less so: alpha gamma, the two terms at the points' mean n
and d, and log(c1 f1) of the capacity factor at a middle L_T / L~.

Shapes: P points, K coefficients, F of them free. All arrays are fp64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_kd.config import ConfigError
from megatron_kd.sweep.scaling.forms import (
    DISTILLATION_NAMES,
    SUPERVISED_NAMES,
    Array,
    log_distillation,
    log_supervised,
    to_coordinate,
)

# Range of each coordinate: wide, and finite so that a direction without information has an end.
BOX = {
    "E": (math.log(1e-3), math.log(20.0)),
    "A": (-30.0, 10.0),
    "B": (-30.0, 10.0),
    "alpha": (1e-3, 3.0),
    "beta": (1e-3, 3.0),
    "gamma": (math.log(0.1), math.log(4.0)),
    "c0": (0.0, 20.0),
    "c1": (-12.0, 6.0),
    "f1": (math.log(0.01), math.log(2.0)),
    "d1": (math.log(0.5), math.log(5.0)),
}
# Coefficients that are their own coordinates.
_OWN_COORDINATES = ("E", "gamma", "c0", "f1", "d1")


@dataclass(frozen=True)
class Problem:
    """Hold points [P] that a law is fitted to.

    Attributes:
        n: log N.
        d: log D.
        log_loss: logarithms of the measured losses.
        weight: how often each point counts.
        delta: where the Huber loss becomes linear.
        held: coefficients that are not fitted, by name.
        t: log L_T; None for the supervised law.
        log_supervised_loss: log L~ of the points; None for the supervised law.
    """

    n: Array
    d: Array
    log_loss: Array
    weight: Array
    delta: float
    held: Mapping[str, float]
    t: Array | None = None
    log_supervised_loss: Array | None = None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the law's coefficients [K]."""
        return SUPERVISED_NAMES if self.t is None else DISTILLATION_NAMES

    @cached_property
    def free(self) -> tuple[str, ...]:
        """Names of the fitted coefficients [F]."""
        return tuple(name for name in self.names if name not in self.held)

    def bounds(self) -> tuple[Array, Array]:
        """Return the range of the free coordinates [F]; E stays below every loss."""
        low, high = np.array([BOX[name] for name in self.free]).T
        if "E" in self.free:
            high[self.free.index("E")] = self.log_loss.min() + 1e-3
        return low, high

    @cached_property
    def center(self) -> tuple[float, float, float, float]:
        """Means of n, d and t, and the log(L_T / L~) at which the capacity factor is measured."""
        t = ratio = 0.0
        if self.t is not None:
            t = float(self.t.mean())
            if self.log_supervised_loss is not None:
                ratio = float((self.t - self.log_supervised_loss).mean())
        return float(self.n.mean()), float(self.d.mean()), t, ratio

    def coefficients(self, y: Array) -> tuple[Array, Array]:
        """Return phi [K] of free coordinates y [F], and d phi / d y [K, F]."""
        units = dict(zip(self.free, np.eye(len(self.free)), strict=True))
        values = dict(zip(self.free, y, strict=True))
        phi = {name: to_coordinate(name, value) for name, value in self.held.items()}
        slope = {name: np.zeros(len(self.free)) for name in self.names}
        n, d, t, ratio = self.center
        for name in _OWN_COORDINATES:
            if name in values:
                phi[name], slope[name] = values[name], units[name]
        gamma, c0 = math.exp(phi["gamma"]), phi.get("c0", 0.0)
        for name in ("alpha", "beta"):
            if name in values:
                phi[name] = values[name] / gamma
                slope[name] = units[name] / gamma - phi[name] * slope["gamma"]
        for name, exponent, mean in (("A", "alpha", n), ("B", "beta", d)):
            if name in values:
                level = (values[name] + c0 * t) / gamma
                phi[name] = level + phi[exponent] * mean
                by_c0 = slope["c0"] * (t / gamma) if "c0" in slope else 0.0
                by_gamma = level * slope["gamma"]
                slope[name] = units[name] / gamma + by_c0 - by_gamma + mean * slope[exponent]
        if "c1" in values:
            f1 = math.exp(phi["f1"])
            log_z = (phi["d1"] - ratio) / f1
            phi["c1"] = values["c1"] + log_z - phi["f1"]
            slope["c1"] = units["c1"] + slope["d1"] / f1 - (log_z + 1.0) * slope["f1"]
        return (
            np.array([phi[name] for name in self.names]),
            np.array([slope[name] for name in self.names]),
        )

    def coordinates(self, phi: Array) -> Array:
        """Return the free coordinates [F] of phi [K]: the inverse of `coefficients`."""
        values = dict(zip(self.names, phi, strict=True))
        n, d, t, ratio = self.center
        gamma, c0 = math.exp(values["gamma"]), values.get("c0", 0.0)
        y = dict(values)
        y["alpha"], y["beta"] = values["alpha"] * gamma, values["beta"] * gamma
        y["A"] = gamma * (values["A"] - values["alpha"] * n) - c0 * t
        y["B"] = gamma * (values["B"] - values["beta"] * d) - c0 * t
        if "c1" in values:
            log_z = (values["d1"] - ratio) / math.exp(values["f1"])
            y["c1"] = values["c1"] + values["f1"] - log_z
        return np.array([y[name] for name in self.free])

    def residuals(self, y: Array) -> tuple[Array, Array]:
        """Return predicted - measured log loss [P], and its derivatives by y [P, F]."""
        phi, chain = self.coefficients(y)
        if self.t is None or self.log_supervised_loss is None:
            value, slopes = log_supervised(phi, self.n, self.d)
        else:
            value, slopes = log_distillation(phi, self.n, self.d, self.t, self.log_supervised_loss)
        return value - self.log_loss, slopes @ chain

    def huber(self, y: Array) -> tuple[float, Array]:
        """Return the sum of Huber losses of the residuals, and its gradient [F].

        The losses are divided by delta, so that a large residual counts as its size.
        """
        residual, slopes = self.residuals(y)
        size = np.abs(residual)
        loss = np.where(size <= self.delta, residual**2 / (2 * self.delta), size - self.delta / 2)
        clipped = np.clip(residual / self.delta, -1.0, 1.0)
        return float(self.weight @ loss), (self.weight * clipped) @ slopes


def search_minima(
    problem: Problem, starts: Sequence[Array], *, least_squares_steps: int = 30, rounds: int = 2
) -> list[tuple[float, Array]]:
    """Return the Huber sums and free coordinates that the starts [F] lead to, the best first.

    Each start first descends in least squares (Gauss-Newton, which is fast along flat directions).
    Then L-BFGS-B minimises the Huber loss in coordinates scaled by how much each changes the
    residuals.

    Args:
        problem: points of a law.
        starts: free coordinates to start from.
        least_squares_steps: largest number of steps in least squares.
        rounds: number of L-BFGS-B runs, each from the end of the previous one.

    Raises:
        ConfigError: if scipy is missing.
    """
    try:
        from scipy.optimize import least_squares
    except ImportError:
        raise ConfigError(
            "fitting a scaling law needs scipy: pip install 'megatron-kd[scaling]'"
        ) from None
    low, high = problem.bounds()
    root = np.sqrt(problem.weight)
    minima = []
    for start in starts:
        descent = least_squares(
            lambda x: root * problem.residuals(x)[0],
            np.clip(start, low + 1e-6, high - 1e-6),
            lambda x: root[:, None] * problem.residuals(x)[1],
            bounds=(low, high),
            x_scale="jac",
            max_nfev=least_squares_steps,
            ftol=1e-6,
            xtol=1e-6,
        )
        y, value = descent.x, math.inf
        for _ in range(rounds):
            y, value = _minimize_huber(problem, y)
        minima.append((value, y))
    return sorted(minima, key=lambda minimum: minimum[0])


def _minimize_huber(problem: Problem, y: Array) -> tuple[Array, float]:
    from scipy.optimize import minimize

    low, high = problem.bounds()
    scale = 1.0 / (np.linalg.norm(problem.residuals(y)[1], axis=0) + 1e-6)

    def scaled(x: Array) -> tuple[float, Array]:
        value, gradient = problem.huber(x * scale)
        return value, gradient * scale

    result = minimize(
        scaled,
        y / scale,
        jac=True,
        method="L-BFGS-B",
        bounds=list(zip(low / scale, high / scale, strict=True)),
        options={"maxiter": 150, "maxcor": 20, "ftol": 1e-7},
    )
    return np.clip(result.x * scale, low, high), float(result.fun)
