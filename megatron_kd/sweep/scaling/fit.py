"""Fit the scaling laws to points, with intervals.

A fit minimises Huber losses (delta 1e-4) of log losses by L-BFGS-B from a grid of starting points.
Its intervals are percentiles over fits to resampled points.

The coefficients of such a law are poorly determined even by hundreds of points (a larger gamma
compensates a smaller alpha, a larger c1 a larger d1), so most of their intervals are wide. Those of
predicted losses are narrow. 95 % intervals held the truth of 348 of 360 coefficients and 138 of 144
losses in 24 fits to noisy points: tests/sweep/test_scaling_law_fits.py, test_coverage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Generic, TypeVar

import numpy as np

from megatron_kd.config import ConfigError
from megatron_kd.sweep.scaling.forms import (
    DISTILLATION_NAMES,
    SUPERVISED_NAMES,
    Array,
    from_coordinate,
    log_supervised,
)
from megatron_kd.sweep.scaling.intervals import expanded_quantiles, widen_interval
from megatron_kd.sweep.scaling.laws import (
    DistillationLaw,
    SupervisedLaw,
    coefficient_names,
    coordinates_of,
)
from megatron_kd.sweep.scaling.problem import Problem, search_minima
from megatron_kd.sweep.scaling.starts import distillation_starts, supervised_starts

HUBER_DELTA = 1e-4
# A coefficient whose interval spans a larger factor is undetermined.
WIDE = 3.0
# So many of the grid's best starting points are refined.
_NUM_REFINED = 6
# A fit to resampled points starts from the best minima of all points: so many of them, whose Huber
# sums exceed the lowest by at most this share.
_NUM_MINIMA, _MINIMA_TOLERANCE = 2, 0.02

Law = TypeVar("Law", SupervisedLaw, DistillationLaw)


@dataclass(frozen=True)
class ScalingPoint:
    """Hold one run.

    Attributes:
        parameters: without embeddings.
        tokens: tokens of training.
        loss: validation loss, nats per token.
        teacher_loss: that of its teacher; None for a run without one.
    """

    parameters: float
    tokens: float
    loss: float
    teacher_loss: float | None = None


@dataclass(frozen=True)
class Estimate:
    """Hold a value and the ends of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fit(Generic[Law]):
    """Hold a law fitted to points.

    Attributes:
        law: the best coefficients.
        resampled: the laws fitted to resampled points, which give the intervals of `estimate`.
        intervals: interval of each fitted coefficient: the percentiles of `resampled`, widened
            where the points allow it (`sweep/scaling/intervals.py`).
        held: coefficients that were not fitted, by name.
        points: the points.
        residuals: predicted - measured log loss of each point [P].
        level: probability of the intervals.
        seed: seed of the resampling.
    """

    law: Law
    resampled: tuple[Law, ...]
    intervals: Mapping[str, tuple[float, float]]
    held: Mapping[str, float]
    points: tuple[ScalingPoint, ...]
    residuals: Array = field(repr=False)
    level: float
    seed: int

    def estimate(self, function: Callable[[Law], float]) -> Estimate:
        """Return a function of the law with its interval.

        Args:
            function: for example `lambda law: law.loss(1e9, 1e11, 2.1)`.
        """
        spread = np.array([float(function(law)) for law in self.resampled])
        low, high = np.quantile(spread, self.quantiles)
        return Estimate(float(function(self.law)), float(low), float(high))

    @property
    def quantiles(self) -> tuple[float, float]:
        """Return the quantiles of the resampled laws at the ends of an interval."""
        free = len(coefficient_names(self.law)) - len(self.held)
        return expanded_quantiles(self.level, len(self.points), free)

    def coefficients(self) -> dict[str, Estimate]:
        """Return the coefficients by name; an interval of no width belongs to a held one."""
        values = {name: float(getattr(self.law, name)) for name in coefficient_names(self.law)}
        return {
            name: Estimate(value, *self.intervals.get(name, (value, value)))
            for name, value in values.items()
        }

    def undetermined(self) -> list[str]:
        """Return the coefficients whose interval spans more than a factor of WIDE.

        Other values of them fit as well, with other values of the rest.
        """
        return [
            name
            for name, estimate in self.coefficients().items()
            if estimate.high > WIDE * max(estimate.low, 1e-12) and name not in self.held
        ]


def fit_supervised(
    points: Sequence[ScalingPoint],
    *,
    held: Mapping[str, float] | None = None,
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> Fit[SupervisedLaw]:
    """Fit the supervised law to the runs without a teacher; points with one are ignored.

    Args:
        points: the runs.
        held: coefficients not to fit, by name. Two points are needed for each fitted coefficient,
            so with few points hold gamma, for example.
        resamples: number of fits to points sampled with replacement, for the intervals.
        level: probability of the intervals.
        seed: seed of the resampling.

    Raises:
        ConfigError: if there are too few points, points do not differ where they must, values are
            out of range, or scipy is missing.
    """
    plain = [point for point in points if point.teacher_loss is None]
    problem = _problem(plain, SUPERVISED_NAMES, held or {}, "supervised")
    _check_intervals(resamples, level)
    minima = _minima(problem, supervised_starts(problem))
    rng, laws = np.random.default_rng(seed), []
    for _ in range(resamples):
        sample = _resample(problem, rng)
        laws.append(SupervisedLaw(**_coefficients(sample, _refit(problem, sample, minima))))
    return Fit(
        law=SupervisedLaw(**_coefficients(problem, minima[0])),
        resampled=tuple(laws),
        intervals=_intervals(problem, minima[0], laws, level),
        held=dict(held or {}),
        points=tuple(plain),
        residuals=problem.residuals(minima[0])[0],
        level=level,
        seed=seed,
    )


def fit_distillation(
    points: Sequence[ScalingPoint],
    supervised: SupervisedLaw | Fit[SupervisedLaw],
    *,
    held: Mapping[str, float] | None = None,
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> Fit[DistillationLaw]:
    """Fit the distillation law to the runs with a teacher; points without one are ignored.

    Args:
        points: the runs.
        supervised: the law of plain runs. The uncertainty of a fit is propagated: each resampled
            fit uses one of its resampled laws.
        held: coefficients not to fit, by name.
        resamples: number of fits to points sampled with replacement, for the intervals.
        level: probability of the intervals.
        seed: seed of the resampling.

    Raises:
        ConfigError: as `fit_supervised`.
    """
    distilled = [point for point in points if point.teacher_loss is not None]
    problem = _problem(distilled, DISTILLATION_NAMES, held or {}, "distillation")
    _check_intervals(resamples, level)
    best, *others = _supervised_laws(supervised)
    problem = _with_supervised(problem, best)
    minima = _minima(problem, distillation_starts(problem))
    rng, laws = np.random.default_rng([seed, 1]), []
    for number in range(resamples):
        base = others[number % len(others)] if others else best
        sample = _resample(_with_supervised(problem, base), rng)
        coefficients = _coefficients(sample, _refit(problem, sample, minima))
        laws.append(DistillationLaw(base, **coefficients))
    return Fit(
        law=DistillationLaw(best, **_coefficients(problem, minima[0])),
        resampled=tuple(laws),
        intervals=_intervals(problem, minima[0], laws, level),
        held=dict(held or {}),
        points=tuple(distilled),
        residuals=problem.residuals(minima[0])[0],
        level=level,
        seed=seed,
    )


def _supervised_laws(supervised: SupervisedLaw | Fit[SupervisedLaw]) -> list[SupervisedLaw]:
    """Return the best law, then the resampled ones of a fit."""
    if isinstance(supervised, Fit):
        return [supervised.law, *supervised.resampled]
    return [supervised]


def _coefficients(problem: Problem, y: Array) -> dict[str, float]:
    phi = problem.coefficients(y)[0]
    return {
        name: float(from_coordinate(name, value))
        for name, value in zip(problem.names, phi, strict=True)
    }


def _check_intervals(resamples: int, level: float) -> None:
    if resamples < 20 or not 0.5 <= level < 1:
        raise ConfigError(
            f"intervals need at least 20 resamples and a level in [0.5, 1), not {resamples} and "
            f"{level}"
        )


def _problem(
    points: Sequence[ScalingPoint], names: tuple[str, ...], held: Mapping[str, float], law: str
) -> Problem:
    """Return the points as arrays.

    Raises:
        ConfigError: if a law of this kind cannot be fitted to them.
    """
    _check_held(names, held, law)
    _check_points(points, names, held, law)
    n, d, log_loss = (
        np.log([getattr(point, name) for point in points])
        for name in ("parameters", "tokens", "loss")
    )
    t = np.log([point.teacher_loss or math.nan for point in points]) if "c0" in names else None
    return Problem(n, d, log_loss, np.ones(len(points)), HUBER_DELTA, dict(held), t)


def _check_held(names: tuple[str, ...], held: Mapping[str, float], law: str) -> None:
    unknown = [name for name in held if name not in names]
    if unknown:
        raise ConfigError(
            f"the {law} law has no coefficient {unknown[0]} to hold: it has {', '.join(names)}"
        )
    for name, value in held.items():
        if not (math.isfinite(value) and (value > 0 or name == "c0")):
            raise ConfigError(
                f"the {law} law's {name} cannot be held at {value}: it must be a positive number"
            )
    if len(held) == len(names):
        raise ConfigError(f"all coefficients of the {law} law are held: leave some to fit")


def _check_points(
    points: Sequence[ScalingPoint], names: tuple[str, ...], held: Mapping[str, float], law: str
) -> None:
    free = len(names) - len(held)
    needed = max(2 * free, 3)
    if len(points) < needed:
        raise ConfigError(
            f"the {law} law has {free} coefficients to fit and needs at least {needed} runs, but "
            f"there are {len(points)}: add runs, or hold coefficients"
        )
    for point in points:
        numbers = [value for value in asdict(point).values() if value is not None]
        if not all(math.isfinite(value) and value > 0 for value in numbers):
            raise ConfigError(f"{point} must have positive, finite numbers")
    columns = {"parameters": {"A", "alpha"}, "tokens": {"B", "beta"}}
    if "c0" in names:
        columns["teacher_loss"] = {"c0", "c1"}
    for column, coefficients in columns.items():
        is_constant = len({getattr(point, column) for point in points}) < 2
        if is_constant and not coefficients <= set(held):
            raise ConfigError(
                f"all runs have the same {column}: the {law} law needs runs that differ in it, or "
                f"hold {', '.join(sorted(coefficients))}"
            )


def _with_supervised(problem: Problem, law: SupervisedLaw) -> Problem:
    """Return the points with the losses of a supervised law."""
    log_loss, _ = log_supervised(coordinates_of(law), problem.n, problem.d)
    return replace(problem, log_supervised_loss=log_loss)


def _resample(problem: Problem, rng: np.random.Generator) -> Problem:
    """Return as many points, sampled with replacement.

    They are sampled again while fewer of them differ than there are coefficients to fit.
    """
    count, counts = len(problem.n), np.zeros(0)
    while np.count_nonzero(counts) < min(len(problem.free) + 1, count):
        counts = np.bincount(rng.integers(0, count, count), minlength=count).astype(float)
    is_kept = counts > 0
    t, log_supervised_loss = (
        None if values is None else values[is_kept]
        for values in (problem.t, problem.log_supervised_loss)
    )
    return replace(
        problem,
        n=problem.n[is_kept],
        d=problem.d[is_kept],
        log_loss=problem.log_loss[is_kept],
        weight=counts[is_kept],
        t=t,
        log_supervised_loss=log_supervised_loss,
    )


def _minima(problem: Problem, grid: Iterable[Array]) -> list[Array]:
    """Return the best minimum that the best starting points lead to, and nearly as low ones."""
    low, high = problem.bounds()
    starts = list(grid)
    ranking = sorted(
        (problem.huber(np.clip(y, low, high))[0], number) for number, y in enumerate(starts)
    )
    minima = search_minima(problem, [starts[number] for _, number in ranking[:_NUM_REFINED]])
    limit = (1 + _MINIMA_TOLERANCE) * minima[0][0]
    kept: list[Array] = []
    for value, y in minima:
        is_new = all(np.abs(y - other).max() > 0.1 for other in kept)
        if value <= limit and is_new:
            kept.append(y)
    return kept[:_NUM_MINIMA]


def _refit(problem: Problem, sample: Problem, minima: list[Array]) -> Array:
    """Return the best coordinates of resampled points, searched from the minima of all points."""
    starts = [sample.coordinates(problem.coefficients(y)[0]) for y in minima]
    return search_minima(sample, starts, least_squares_steps=12, rounds=1)[0][1]


def _intervals(
    problem: Problem, y: Array, laws: Sequence[SupervisedLaw | DistillationLaw], level: float
) -> dict[str, tuple[float, float]]:
    quantiles = expanded_quantiles(level, len(problem.n), len(problem.free))
    intervals = {}
    for name in problem.free:
        low, high = np.quantile([getattr(law, name) for law in laws], quantiles)
        intervals[name] = widen_interval(problem, y, name, (float(low), float(high)), level)
    return intervals
