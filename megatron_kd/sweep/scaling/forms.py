"""The two scaling laws as functions of their coefficients, with derivatives, and the search for the best coefficients.

Written in logarithms, as arXiv 2502.08606 fits them. Of a point n = log N, d = log D, t = log L_T:
    supervised     log L   = logaddexp(log E, gamma u),                                     u = logaddexp(log A - alpha n, log B - beta d)
    distillation   log L_S = logaddexp(t, gamma u - c0 t - c1 f1 log(1 + z)),               z = (L_T / (L~ d1))^(1 / f1)

Raw coefficients are nearly exchangeable: alpha with gamma, A with alpha, c1 with d1. The search goes over coordinates in which they
are less so: alpha gamma, the two terms at the points' mean n and d, and log(c1 f1) of the capacity factor at a middle L_T / L~.

Shapes: P points, K coefficients, F of them free. All fp64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_kd.config import ConfigError

Array = NDArray[np.float64]

SUPERVISED_NAMES = ("E", "A", "B", "alpha", "beta", "gamma")
DISTILLATION_NAMES = ("A", "B", "alpha", "beta", "gamma", "c0", "c1", "f1", "d1")
# Coefficients that the forms take by themselves; of the others they take logarithms.
_PLAIN = ("alpha", "beta", "c0")
# Where coordinates are looked for: wide, and there so that a direction without information ends somewhere.
BOX = {
    "E": (math.log(1e-3), math.log(20.0)), "A": (-30.0, 10.0), "B": (-30.0, 10.0), "alpha": (1e-3, 3.0), "beta": (1e-3, 3.0),
    "gamma": (math.log(0.1), math.log(4.0)), "c0": (0.0, 20.0), "c1": (-12.0, 6.0), "f1": (math.log(0.01), math.log(2.0)),
    "d1": (math.log(0.5), math.log(5.0)),
}  # fmt: skip


def to_coordinates(name: str, value: float) -> float:
    """A coefficient as the forms take it."""
    return value if name in _PLAIN else math.log(value)


def from_coordinates(name: str, value: float) -> float:
    """The inverse of `to_coordinates`."""
    return value if name in _PLAIN else math.exp(value)


def log_supervised(phi: Array, n: Array, d: Array) -> tuple[Array, Array]:
    """log L [P] of coefficients phi [6] as `to_coordinates` gives them, and d log L / d phi [P, 6]."""
    u, slopes = _reducible(phi[1:], n, d)
    value = np.logaddexp(phi[0], u)
    share = np.exp(u - value)
    return value, np.column_stack([1.0 - share, share[:, None] * slopes])


def log_distillation(
    phi: Array, n: Array, d: Array, t: Array, log_supervised_loss: Array
) -> tuple[Array, Array]:
    """log L_S [P] of phi [9], and d log L_S / d phi [P, 9]. log_supervised_loss: log L~ of the points."""
    u, slopes = _reducible(phi[:5], n, d)
    c0, log_c1, log_f1, log_d1 = phi[5:]
    f1 = math.exp(log_f1)
    away = (t - log_supervised_loss - log_d1) / f1
    softplus, slope = np.logaddexp(0.0, away), np.exp(-np.logaddexp(0.0, -away))
    weight = math.exp(log_c1) * f1
    capacity = weight * softplus
    term = u - c0 * t - capacity
    value = np.logaddexp(t, term)
    share = np.exp(term - value)[:, None]
    columns = [-t, -capacity, -(capacity - weight * slope * away), weight * slope / f1]
    return value, share * np.column_stack([slopes, *columns])


def _reducible(phi: Array, n: Array, d: Array) -> tuple[Array, Array]:
    """gamma * logaddexp(log A - alpha n, log B - beta d) [P] of (log A, log B, alpha, beta, log gamma), and its derivatives [P, 5]."""
    a, b, alpha, beta, log_gamma = phi
    gamma = math.exp(log_gamma)
    left, right = a - alpha * n, b - beta * d
    inner = np.logaddexp(left, right)
    of_left = np.exp(left - inner)
    of_right = 1.0 - of_left
    slopes = np.column_stack([of_left, of_right, -of_left * n, -of_right * d, inner])
    return gamma * inner, gamma * slopes


@dataclass(frozen=True)
class Problem:
    """Points to be explained by a law, [P] each; `held` coefficients stay as they are.

    log_supervised_loss: log L~, None for the supervised law itself (which has no teacher). weight: how often a point counts.
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
        return SUPERVISED_NAMES if self.t is None else DISTILLATION_NAMES

    @cached_property
    def free(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name not in self.held)

    def bounds(self) -> tuple[Array, Array]:
        """Of the free coordinates. E stays below every loss."""
        low, high = np.array([BOX[name] for name in self.free]).T
        if "E" in self.free:
            high[self.free.index("E")] = self.log_loss.min() + 1e-3
        return low, high

    @cached_property
    def middle(self) -> tuple[float, float, float, float]:
        """Means of n, d and t, and the L_T / L~, as a logarithm, at which the capacity factor is measured."""
        t = 0.0 if self.t is None else float(self.t.mean())
        ratio = (
            0.0
            if self.t is None or self.log_supervised_loss is None
            else float((self.t - self.log_supervised_loss).mean())
        )
        return float(self.n.mean()), float(self.d.mean()), t, ratio

    def coefficients(self, y: Array) -> tuple[Array, Array]:
        """phi [K] of free coordinates y [F], and d phi / d y [K, F]."""
        free, unit = self.free, dict(zip(self.free, np.eye(len(self.free)), strict=True))
        given = dict(zip(free, y, strict=True))
        phi: dict[str, float] = {
            name: to_coordinates(name, value) for name, value in self.held.items()
        }
        slope = {name: np.zeros(len(free)) for name in self.names}
        n, d, t, ratio = self.middle
        for name in ("E", "gamma", "c0", "f1", "d1"):
            if name in given:
                phi[name], slope[name] = given[name], unit[name]
        gamma, c0 = math.exp(phi["gamma"]), phi.get("c0", 0.0)
        for name in ("alpha", "beta"):
            if name in given:
                phi[name] = given[name] / gamma
                slope[name] = unit[name] / gamma - phi[name] * slope["gamma"]
        for name, exponent, at in (("A", "alpha", n), ("B", "beta", d)):
            if name in given:
                level = (given[name] + c0 * t) / gamma
                phi[name] = level + phi[exponent] * at
                by_c0 = slope["c0"] * (t / gamma) if "c0" in slope else 0.0
                slope[name] = (
                    unit[name] / gamma + by_c0 - level * slope["gamma"] + at * slope[exponent]
                )
        if "c1" in given:
            f1 = math.exp(phi["f1"])
            phi["c1"] = given["c1"] + (phi["d1"] - ratio) / f1 - phi["f1"]
            slope["c1"] = (
                unit["c1"] + slope["d1"] / f1 - ((phi["d1"] - ratio) / f1 + 1.0) * slope["f1"]
            )
        return np.array([phi[name] for name in self.names]), np.array(
            [slope[name] for name in self.names]
        )

    def coordinates(self, phi: Array) -> Array:
        """The free coordinates [F] of coefficients phi [K]: the inverse of `coefficients`."""
        of = dict(zip(self.names, phi, strict=True))
        n, d, t, ratio = self.middle
        gamma = math.exp(of["gamma"])
        y = dict(of)
        y["alpha"], y["beta"] = of["alpha"] * gamma, of["beta"] * gamma
        y["A"] = gamma * (of["A"] - of["alpha"] * n) - of.get("c0", 0.0) * t
        y["B"] = gamma * (of["B"] - of["beta"] * d) - of.get("c0", 0.0) * t
        if "c1" in of:
            y["c1"] = of["c1"] + of["f1"] - (of["d1"] - ratio) / math.exp(of["f1"])
        return np.array([y[name] for name in self.free])

    def residuals(self, y: Array) -> tuple[Array, Array]:
        """Predicted - measured log loss [P], and its derivatives by y [P, F]."""
        phi, chain = self.coefficients(y)
        if self.t is None or self.log_supervised_loss is None:
            value, slopes = log_supervised(phi, self.n, self.d)
        else:
            value, slopes = log_distillation(phi, self.n, self.d, self.t, self.log_supervised_loss)
        return value - self.log_loss, slopes @ chain

    def huber(self, y: Array) -> tuple[float, Array]:
        """Sum of Huber losses of the residuals over delta, so that a large residual counts as its size, and its gradient [F]."""
        residual, slopes = self.residuals(y)
        size = np.abs(residual)
        loss = np.where(size <= self.delta, residual**2 / (2 * self.delta), size - self.delta / 2)
        return float(self.weight @ loss), (
            self.weight * np.clip(residual / self.delta, -1.0, 1.0)
        ) @ slopes


def search(
    problem: Problem, starts: list[Array], *, squares: int = 30, rounds: int = 2
) -> list[tuple[float, Array]]:
    """Where several starts [F] lead: Huber sums and free coordinates, the best first.

    Each start first goes downhill in squares (Gauss-Newton, `squares` steps at most: fast along the flat directions), then L-BFGS-B
    minimises the Huber loss in coordinates scaled by how much each moves the residuals, `rounds` times, each from where the last ended.
    """
    try:
        from scipy.optimize import least_squares
    except ImportError:
        raise ConfigError(
            "fitting a scaling law needs scipy: pip install 'megatron-kd[scaling]'"
        ) from None
    low, high = problem.bounds()
    root = np.sqrt(problem.weight)
    found = []
    for start in starts:
        y = np.clip(start, low + 1e-6, high - 1e-6)
        near = least_squares(
            lambda x: root * problem.residuals(x)[0],
            y,
            lambda x: root[:, None] * problem.residuals(x)[1],
            bounds=(low, high),
            x_scale="jac",
            max_nfev=squares,
            ftol=1e-6,
            xtol=1e-6,
        )
        y, value = near.x, math.inf
        for _ in range(rounds):
            y, value = _minimize_huber(problem, y)
        found.append((value, y))
    return sorted(found, key=lambda each: each[0])


def _minimize_huber(problem: Problem, y: Array) -> tuple[Array, float]:
    from scipy.optimize import minimize

    low, high = problem.bounds()
    scale = 1.0 / (np.linalg.norm(problem.residuals(y)[1], axis=0) + 1e-6)

    def scaled(x: Array) -> tuple[float, Array]:
        value, gradient = problem.huber(x * scale)
        return value, gradient * scale

    bounds = list(zip(low / scale, high / scale, strict=True))
    options = {"maxiter": 150, "maxcor": 20, "ftol": 1e-7}
    done = minimize(scaled, y / scale, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return np.clip(done.x * scale, low, high), float(done.fun)
