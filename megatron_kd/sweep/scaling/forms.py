"""Compute the two scaling laws in logarithms, with their derivatives.

arXiv 2502.08606 fits them in this form. For a point n = log N, d = log D, t = log L_T:

    supervised     log L   = logaddexp(log E, gamma u)
    distillation   log L_S = logaddexp(t, gamma u - c0 t - c1 f1 log(1 + z))

with u = logaddexp(log A - alpha n, log B - beta d) and z = (L_T / (L~ d1))^(1 / f1), where L~ is
the loss of the supervised law.

Shapes: P points; all arrays are fp64. A vector phi holds coefficients in the order of
SUPERVISED_NAMES or DISTILLATION_NAMES, as `to_coordinate` gives them.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SUPERVISED_NAMES = ("E", "A", "B", "alpha", "beta", "gamma")
DISTILLATION_NAMES = ("A", "B", "alpha", "beta", "gamma", "c0", "c1", "f1", "d1")
# Coefficients that the forms take unchanged; they take logarithms of the others.
_LINEAR_NAMES = ("alpha", "beta", "c0")


def to_coordinate(name: str, value: float) -> float:
    """Return a coefficient as the forms take it."""
    return value if name in _LINEAR_NAMES else math.log(value)


def from_coordinate(name: str, value: float) -> float:
    """Return the coefficient of a coordinate: the inverse of `to_coordinate`."""
    return value if name in _LINEAR_NAMES else math.exp(value)


def log_supervised(phi: Array, n: Array, d: Array) -> tuple[Array, Array]:
    """Return log L [P] of coefficients phi [6], and d log L / d phi [P, 6]."""
    reducible, slopes = _log_reducible(phi[1:], n, d)
    value = np.logaddexp(phi[0], reducible)
    share = np.exp(reducible - value)
    return value, np.column_stack([1.0 - share, share[:, None] * slopes])


def log_distillation(
    phi: Array, n: Array, d: Array, t: Array, log_supervised_loss: Array
) -> tuple[Array, Array]:
    """Return log L_S [P] of coefficients phi [9], and d log L_S / d phi [P, 9].

    Args:
        phi: coefficients [9].
        n: log N [P].
        d: log D [P].
        t: log L_T [P].
        log_supervised_loss: log L~ [P] of the points.
    """
    reducible, slopes = _log_reducible(phi[:5], n, d)
    c0, log_c1, log_f1, log_d1 = phi[5:]
    f1 = math.exp(log_f1)
    log_z = (t - log_supervised_loss - log_d1) / f1
    softplus, softplus_slope = np.logaddexp(0.0, log_z), np.exp(-np.logaddexp(0.0, -log_z))
    weight = math.exp(log_c1) * f1
    capacity = weight * softplus
    term = reducible - c0 * t - capacity
    value = np.logaddexp(t, term)
    share = np.exp(term - value)[:, None]
    f1_slope = -(capacity - weight * softplus_slope * log_z)
    columns = [-t, -capacity, f1_slope, weight * softplus_slope / f1]
    return value, share * np.column_stack([slopes, *columns])


def _log_reducible(phi: Array, n: Array, d: Array) -> tuple[Array, Array]:
    """Return gamma u [P] of (log A, log B, alpha, beta, log gamma), and its derivatives [P, 5]."""
    log_a, log_b, alpha, beta, log_gamma = phi
    gamma = math.exp(log_gamma)
    size_term, token_term = log_a - alpha * n, log_b - beta * d
    u = np.logaddexp(size_term, token_term)
    size_share = np.exp(size_term - u)
    token_share = 1.0 - size_share
    slopes = np.column_stack([size_share, token_share, -size_share * n, -token_share * d, u])
    return gamma * u, gamma * slopes
