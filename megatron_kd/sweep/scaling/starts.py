"""Where the search for the coefficients of a scaling law begins: a grid over the exponents.

With the exponents given, what is left is a sum of two known columns times A^ and B^, which two lines of linear algebra solve; so a grid
over the rest covers all coefficients. Held coefficients keep their values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import numpy as np

from megatron_kd.sweep.scaling.forms import Array, Problem, to_coordinates


def supervised_starts(problem: Problem) -> Iterator[Array]:
    """Free coordinates [F] over a grid of E, gamma, and the powers alpha gamma and beta gamma of the whole terms."""
    loss = np.exp(problem.log_loss)
    for part, power_n, power_d, gamma in product(
        (0.2, 0.5, 0.8), (0.1, 0.2, 0.4), (0.1, 0.2, 0.4), (0.3, 0.7, 1.5)
    ):
        bottom = _given(problem, "E", part * float(loss.min()))
        yield _start(problem, {"E": bottom}, loss - bottom, power_n, power_d, gamma)


def distillation_starts(problem: Problem) -> Iterator[Array]:
    """Free coordinates [F] over a grid of powers, gamma, c0, f1, d1 and how much the capacity factor takes off in the middle."""
    assert problem.t is not None
    assert problem.log_supervised_loss is not None
    excess = np.maximum(np.exp(problem.log_loss) - np.exp(problem.t), 1e-3)
    grid = product(
        (0.15, 0.4), (0.15, 0.4), (0.3, 1.0), (0.5, 2.5), (0.05, 0.15, 0.5), (1.0, 1.4), (0.05, 0.5)
    )
    for power_n, power_d, gamma, c0, f1, d1, taken in grid:
        c0, f1, d1 = (
            _given(problem, name, value) for name, value in (("c0", c0), ("f1", f1), ("d1", d1))
        )
        away = np.logaddexp(0.0, (problem.t - problem.log_supervised_loss - math.log(d1)) / f1)
        c1 = _given(problem, "c1", taken / (f1 * float(np.median(away))))
        rest = np.exp(np.log(excess) + c0 * problem.t + np.minimum(c1 * f1 * away, 20.0))
        yield _start(
            problem, {"c0": c0, "c1": c1, "f1": f1, "d1": d1}, rest, power_n, power_d, gamma
        )


def _given(problem: Problem, name: str, value: float) -> float:
    return problem.held.get(name, value)


def _start(
    problem: Problem,
    others: dict[str, float],
    rest: Array,
    power_n: float,
    power_d: float,
    gamma: float,
) -> Array:
    """The free coordinates whose (A / N^alpha + B / D^beta)^gamma is nearest to `rest` [P], relative to it."""
    gamma = _given(problem, "gamma", gamma)
    alpha, beta = (
        _given(problem, "alpha", power_n / gamma),
        _given(problem, "beta", power_d / gamma),
    )
    wanted = np.log(rest) / gamma
    columns = np.column_stack([-alpha * problem.n, -beta * problem.d])
    middle = (wanted[:, None] - columns).mean(0)  # log A and log B if each alone had to do
    relative = np.exp(np.clip(columns + middle - wanted[:, None], -30.0, 30.0))
    shares = np.linalg.lstsq(relative, np.ones(len(rest)), rcond=None)[0]
    a, b = middle + np.log(np.maximum(shares, 1e-3))
    levels = {"A": a, "B": b, "alpha": alpha, "beta": beta, "gamma": math.log(gamma)}
    phi = {**levels, **{name: to_coordinates(name, value) for name, value in others.items()}}
    phi |= {name: to_coordinates(name, value) for name, value in problem.held.items()}
    return problem.coordinates(np.array([phi[name] for name in problem.names]))
