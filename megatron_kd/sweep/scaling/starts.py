"""Choose where the search for the coefficients of a scaling law starts: a grid over the exponents.

For given exponents the rest is a sum of two known columns times A^ and B^, which linear algebra
solves. So a grid over the others covers all coefficients. Held coefficients keep their values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from megatron_kd.sweep.scaling.forms import Array, to_coordinate
from megatron_kd.sweep.scaling.problem import Problem


@dataclass(frozen=True)
class _Exponents:
    """Hold the powers alpha gamma and beta gamma of the whole terms, and gamma."""

    n: float
    d: float
    gamma: float


def supervised_starts(problem: Problem) -> Iterator[Array]:
    """Yield free coordinates [F] over a grid of E and the exponents."""
    loss = np.exp(problem.log_loss)
    for share, power_n, power_d, gamma in product(
        (0.2, 0.5, 0.8), (0.1, 0.2, 0.4), (0.1, 0.2, 0.4), (0.3, 0.7, 1.5)
    ):
        floor = problem.held.get("E", share * float(loss.min()))
        yield _start(problem, {"E": floor}, loss - floor, _Exponents(power_n, power_d, gamma))


def distillation_starts(problem: Problem) -> Iterator[Array]:
    """Yield free coordinates [F] over a grid of exponents, c0, f1, d1 and the capacity factor.

    The last one is varied by how much it takes off the logarithm of the loss in the middle.
    """
    assert problem.t is not None
    assert problem.log_supervised_loss is not None
    held = problem.held
    excess = np.maximum(np.exp(problem.log_loss) - np.exp(problem.t), 1e-3)
    grid = product(
        (0.15, 0.4), (0.15, 0.4), (0.3, 1.0), (0.5, 2.5), (0.05, 0.15, 0.5), (1.0, 1.4), (0.05, 0.5)
    )
    for power_n, power_d, gamma, grid_c0, grid_f1, grid_d1, reduction in grid:
        c0, f1, d1 = held.get("c0", grid_c0), held.get("f1", grid_f1), held.get("d1", grid_d1)
        log_z = (problem.t - problem.log_supervised_loss - math.log(d1)) / f1
        softplus = np.logaddexp(0.0, log_z)
        c1 = held.get("c1", reduction / (f1 * float(np.median(softplus))))
        capacity = np.minimum(c1 * f1 * softplus, 20.0)
        reducible = np.exp(np.log(excess) + c0 * problem.t + capacity)
        coefficients = {"c0": c0, "c1": c1, "f1": f1, "d1": d1}
        yield _start(problem, coefficients, reducible, _Exponents(power_n, power_d, gamma))


def _start(
    problem: Problem, coefficients: dict[str, float], reducible: Array, exponents: _Exponents
) -> Array:
    """Return the free coordinates whose reducible loss is nearest to the points'.

    Args:
        problem: points of a law.
        coefficients: those that the reducible loss (A / N^alpha + B / D^beta)^gamma does not have.
        reducible: the reducible loss of the points [P]; the fit is relative to it.
        exponents: powers of the two terms.
    """
    gamma = problem.held.get("gamma", exponents.gamma)
    alpha = problem.held.get("alpha", exponents.n / gamma)
    beta = problem.held.get("beta", exponents.d / gamma)
    log_sum = np.log(reducible) / gamma
    columns = np.column_stack([-alpha * problem.n, -beta * problem.d])
    # log A and log B if each term had to explain the loss alone.
    levels = (log_sum[:, None] - columns).mean(0)
    relative = np.exp(np.clip(columns + levels - log_sum[:, None], -30.0, 30.0))
    shares = np.linalg.lstsq(relative, np.ones(len(reducible)), rcond=None)[0]
    log_a, log_b = levels + np.log(np.maximum(shares, 1e-3))
    phi = {"A": log_a, "B": log_b, "alpha": alpha, "beta": beta, "gamma": math.log(gamma)}
    phi |= {name: to_coordinate(name, value) for name, value in coefficients.items()}
    phi |= {name: to_coordinate(name, value) for name, value in problem.held.items()}
    return problem.coordinates(np.array([phi[name] for name in problem.names]))
