"""Scaling laws of plain and distilled pretraining (arXiv 2502.08606): what loss a student of a size reaches on a number of tokens.

    supervised      L~(N, D)       = E + (A / N^alpha + B / D^beta)^gamma
    distillation    L_S(N, D, L_T) = L_T + L_T^-c0 (1 + (L_T / (L~ d1))^(1/f1))^(-c1 f1) (A' / N^alpha' + B' / D^beta')^gamma'

N: parameters without embeddings. D: tokens. L_T: the teacher's cross-entropy on the student's validation data; its size does not enter.
Losses are nats per token. A fit minimises Huber losses (delta 1e-4) of log losses by L-BFGS-B from a grid of starting points; its
intervals are percentiles over fits to resampled points. Prices in FLOPs: `sweep/scaling/compute.py`.

What to trust: the coefficients of such a law are poorly determined even by hundreds of points (a larger gamma makes up for a smaller
alpha, a larger c1 for a larger d1), so most of their intervals are wide; those of predicted losses are narrow. 95 % intervals held
the truth of 348 of 360 coefficients and 138 of 144 losses in 24 fits to noisy points: tests/sweep/test_scaling_law.py, test_coverage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Generic, TypeVar

import numpy as np

from megatron_kd.config import ConfigError
from megatron_kd.sweep.scaling.forms import (
    DISTILLATION_NAMES,
    SUPERVISED_NAMES,
    Array,
    Problem,
    from_coordinates,
    log_distillation,
    log_supervised,
    search,
    to_coordinates,
)
from megatron_kd.sweep.scaling.profile import widen
from megatron_kd.sweep.scaling.starts import distillation_starts, supervised_starts

HUBER_DELTA = 1e-4
# A coefficient whose interval spans a larger factor is called not determined.
WIDE = 3.0
_REFINED = 6  # of the grid's starting points, the best so many are refined
# A fit to resampled points starts from the best minima of all points: this many, whose Huber sums exceed the lowest by this share.
_RESAMPLED, _RIVAL = 2, 0.02


@dataclass(frozen=True)
class SupervisedLaw:
    """L~(N, D) = E + (A / N^alpha + B / D^beta)^gamma, nats per token."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    gamma: float

    def loss(self, parameters: Array | float, tokens: Array | float) -> Array:
        """Cross-entropy of models of `parameters` (without embeddings) after `tokens`; shapes are broadcast."""
        n, d = np.broadcast_arrays(
            np.log(np.asarray(parameters, float)), np.log(np.asarray(tokens, float))
        )
        value, _ = log_supervised(_phi(self, SUPERVISED_NAMES), n.ravel(), d.ravel())
        return np.exp(value).reshape(n.shape)


@dataclass(frozen=True)
class DistillationLaw:
    """L_S(N, D, L_T) as the module says; the fields without `supervised` are the primed ones."""

    supervised: SupervisedLaw
    A: float
    B: float
    alpha: float
    beta: float
    gamma: float
    c0: float
    c1: float
    f1: float
    d1: float

    def loss(
        self, parameters: Array | float, tokens: Array | float, teacher_loss: Array | float
    ) -> Array:
        """Cross-entropy of distilled students; shapes are broadcast."""
        n, d, t = np.broadcast_arrays(
            *(np.log(np.asarray(each, float)) for each in (parameters, tokens, teacher_loss))
        )
        plain, _ = log_supervised(_phi(self.supervised, SUPERVISED_NAMES), n.ravel(), d.ravel())
        value, _ = log_distillation(
            _phi(self, DISTILLATION_NAMES), n.ravel(), d.ravel(), t.ravel(), plain
        )
        return np.exp(value).reshape(n.shape)

    def best_teacher_loss(self, parameters: float, tokens: float) -> float:
        """The teacher's loss at which this student ends lowest: a stronger teacher would be too far ahead of it.

        Looked for between the lowest loss any model reaches by the supervised law, E, and twice the student's own.
        """
        plain = float(self.supervised.loss(parameters, tokens))
        low, high = math.log(max(self.supervised.E, 0.05 * plain)), math.log(2 * plain)
        for _ in range(4):  # each round narrows a grid to its best point's neighbours
            grid = np.linspace(low, high, 201)
            at = int(self.loss(parameters, tokens, np.exp(grid)).argmin())
            low, high = float(grid[max(at - 1, 0)]), float(grid[min(at + 1, 200)])
        return math.exp((low + high) / 2)


# arXiv 2502.08606: 73 supervised and 697 distilled runs on English C4, students of 143M to 12.6B, up to 512B tokens.
PUBLISHED_SUPERVISED = SupervisedLaw(
    E=1.220, A=3355.0, B=18186.0, alpha=0.408, beta=0.431, gamma=0.452
)
PUBLISHED_DISTILLATION = DistillationLaw(
    PUBLISHED_SUPERVISED,
    A=2243.0,
    B=24181.0,
    alpha=0.321,
    beta=0.637,
    gamma=0.764,
    c0=2.549,
    c1=522.6,
    f1=0.090,
    d1=1.315,
)

Law = TypeVar("Law", SupervisedLaw, DistillationLaw)


@dataclass(frozen=True)
class Point:
    """One run: parameters without embeddings, tokens, its loss, and its teacher's (None: trained without one); nats per token."""

    parameters: float
    tokens: float
    loss: float
    teacher_loss: float | None = None


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fit(Generic[Law]):
    """A law fitted to points.

    Attributes:
        law: the best coefficients.
        draws: the laws fitted to resampled points, from which the intervals of `estimate` come.
        intervals: of each fitted coefficient: theirs, and farther where the points allow it (`sweep/scaling/profile.py`).
        held: coefficients that were given, not fitted.
        points: what it was fitted to. residuals: predicted - measured log loss of each [P].
        level, seed: of the intervals.
    """

    law: Law
    draws: tuple[Law, ...]
    intervals: Mapping[str, tuple[float, float]]
    held: Mapping[str, float]
    points: tuple[Point, ...]
    residuals: Array = field(repr=False)
    level: float
    seed: int

    def estimate(self, function: Callable[[Law], float]) -> Estimate:
        """Anything that a law says, with its interval: `fit.estimate(lambda law: law.loss(1e9, 1e11, 2.1))`."""
        spread = np.array([float(function(law)) for law in self.draws])
        low, high = np.quantile(spread, self.quantiles)
        return Estimate(float(function(self.law)), float(low), float(high))

    @property
    def quantiles(self) -> tuple[float, float]:
        """Of the draws, at the ends of an interval."""
        return expanded_quantiles(
            self.level, len(self.points), len(_names(self.law)) - len(self.held)
        )

    def coefficients(self) -> dict[str, Estimate]:
        """Name -> value and interval; an interval of no width is of one that was held."""
        values = {name: float(getattr(self.law, name)) for name in _names(self.law)}
        return {
            name: Estimate(value, *self.intervals.get(name, (value, value)))
            for name, value in values.items()
        }

    def undetermined(self) -> list[str]:
        """Coefficients whose interval spans more than a factor of WIDE: other values fit as well, with others of the rest."""
        return [
            name
            for name, of in self.coefficients().items()
            if of.high > WIDE * max(of.low, 1e-12) and name not in self.held
        ]


def fit_supervised(
    points: Sequence[Point],
    *,
    held: Mapping[str, float] | None = None,
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> Fit[SupervisedLaw]:
    """The supervised law of runs without a teacher; points that have one are left out.

    Args:
        held: coefficients not to fit, by name. With few points hold gamma, say: two points are needed for each that is fitted.
        resamples: fits to points drawn with replacement, for the intervals. level: probability that an interval is made for.
    Raises:
        ConfigError: too few points, points that do not differ where they must, values out of range, scipy missing.
    """
    chosen = [point for point in points if point.teacher_loss is None]
    problem = _problem(chosen, SUPERVISED_NAMES, held or {}, "supervised")
    _check_intervals(resamples, level)
    minima = _minima(problem, supervised_starts(problem))
    best = _law(problem, minima[0])
    rng, draws = np.random.default_rng(seed), []
    for _ in range(resamples):
        part = _resampled(problem, rng)
        draws.append(_law(part, _refit(problem, part, minima)))
    intervals = _intervals(problem, minima[0], draws, level)
    return Fit(
        best,
        tuple(draws),
        intervals,
        dict(held or {}),
        tuple(chosen),
        problem.residuals(minima[0])[0],
        level,
        seed,
    )


def fit_distillation(
    points: Sequence[Point],
    supervised: SupervisedLaw | Fit[SupervisedLaw],
    *,
    held: Mapping[str, float] | None = None,
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> Fit[DistillationLaw]:
    """The distillation law of runs with a teacher; points without one are left out. Arguments and errors as in `fit_supervised`.

    supervised: the law of plain runs. Where it is a fit, its uncertainty is carried on: each resampled fit rests on one of its draws.
    """
    chosen = [point for point in points if point.teacher_loss is not None]
    problem = _problem(chosen, DISTILLATION_NAMES, held or {}, "distillation")
    _check_intervals(resamples, level)
    fixed = supervised.law if isinstance(supervised, Fit) else supervised
    problem = _on(problem, fixed)
    minima = _minima(problem, distillation_starts(problem))
    best = DistillationLaw(fixed, **_values(problem, minima[0]))
    rng, draws = np.random.default_rng([seed, 1]), []
    for number in range(resamples):
        own = (
            supervised.draws[number % len(supervised.draws)]
            if isinstance(supervised, Fit)
            else supervised
        )
        part = _resampled(_on(problem, own), rng)
        draws.append(DistillationLaw(own, **_values(part, _refit(problem, part, minima))))
    intervals = _intervals(problem, minima[0], draws, level)
    return Fit(
        best,
        tuple(draws),
        intervals,
        dict(held or {}),
        tuple(chosen),
        problem.residuals(minima[0])[0],
        level,
        seed,
    )


def expanded_quantiles(level: float, points: int, free: int) -> tuple[float, float]:
    """Quantiles of the draws for an interval of `level`: farther out than (1 - level) / 2 where points are few.

    Resampling P points sees only (P - F) / P of the variance, and no t-distribution: Hesterberg, arXiv 1411.5279.
    """
    from scipy.special import ndtr, stdtrit

    freedom = max(points - free, 1)
    tail = float(ndtr(-math.sqrt(points / freedom) * stdtrit(freedom, (1 + level) / 2)))
    return tail, 1.0 - tail


def _names(law: SupervisedLaw | DistillationLaw) -> tuple[str, ...]:
    return SUPERVISED_NAMES if isinstance(law, SupervisedLaw) else DISTILLATION_NAMES


def _phi(law: SupervisedLaw | DistillationLaw, names: tuple[str, ...]) -> Array:
    return np.array([to_coordinates(name, getattr(law, name)) for name in names])


def _values(problem: Problem, y: Array) -> dict[str, float]:
    phi = problem.coefficients(y)[0]
    return {
        name: float(from_coordinates(name, value))
        for name, value in zip(problem.names, phi, strict=True)
    }


def _law(problem: Problem, y: Array) -> SupervisedLaw:
    return SupervisedLaw(**_values(problem, y))


def _check_intervals(resamples: int, level: float) -> None:
    if resamples < 20 or not 0.5 <= level < 1:
        raise ConfigError(
            f"intervals need at least 20 resamples and a level in [0.5, 1), not {resamples} and {level}"
        )


def _problem(
    points: Sequence[Point], names: tuple[str, ...], held: Mapping[str, float], what: str
) -> Problem:
    """The points as arrays. ConfigError where a law of this kind cannot be fitted to them."""
    unknown = [name for name in held if name not in names]
    if unknown:
        raise ConfigError(
            f"the {what} law has no coefficient {unknown[0]} to hold: it has {', '.join(names)}"
        )
    for name, value in held.items():
        if not (math.isfinite(value) and (value > 0 or name == "c0")):
            raise ConfigError(
                f"the {what} law's {name} cannot be held at {value}: it must be a positive number"
            )
    free = len(names) - len(held)
    if not free:
        raise ConfigError(f"all coefficients of the {what} law are held: leave some to fit")
    if len(points) < max(2 * free, 3):
        raise ConfigError(
            f"the {what} law has {free} coefficients to fit and needs at least {max(2 * free, 3)} runs, but there are {len(points)}: "
            "add runs, or hold coefficients"
        )
    for point in points:
        if not all(
            math.isfinite(value) and value > 0
            for value in asdict(point).values()
            if value is not None
        ):
            raise ConfigError(f"{point} must have positive, finite numbers")
    columns = [("parameters", {"A", "alpha"}), ("tokens", {"B", "beta"})] + (
        [("teacher_loss", {"c0", "c1"})] if "c0" in names else []
    )
    for column, needs in columns:
        if len({getattr(point, column) for point in points}) < 2 and not needs <= set(held):
            raise ConfigError(
                f"all runs have the same {column}: the {what} law needs runs that differ in it, or hold {', '.join(sorted(needs))}"
            )
    n, d, log_loss = (
        np.log([getattr(point, name) for point in points])
        for name in ("parameters", "tokens", "loss")
    )
    t = np.log([point.teacher_loss or math.nan for point in points]) if "c0" in names else None
    return Problem(n, d, log_loss, np.ones(len(points)), HUBER_DELTA, dict(held), t)


def _on(problem: Problem, law: SupervisedLaw) -> Problem:
    """The same points, seen from a supervised law."""
    plain, _ = log_supervised(_phi(law, SUPERVISED_NAMES), problem.n, problem.d)
    return Problem(
        problem.n,
        problem.d,
        problem.log_loss,
        problem.weight,
        problem.delta,
        problem.held,
        problem.t,
        plain,
    )


def _resampled(problem: Problem, rng: np.random.Generator) -> Problem:
    """As many points, drawn with replacement; drawn again while fewer differ than there are coefficients to fit."""
    count, drawn = len(problem.n), np.zeros(0)
    while np.count_nonzero(drawn) < min(len(problem.free) + 1, count):
        drawn = np.bincount(rng.integers(0, count, count), minlength=count).astype(float)
    kept = drawn > 0
    parts = [
        None if each is None else each[kept] for each in (problem.t, problem.log_supervised_loss)
    ]
    return Problem(
        problem.n[kept],
        problem.d[kept],
        problem.log_loss[kept],
        drawn[kept],
        problem.delta,
        problem.held,
        *parts,
    )


def _minima(problem: Problem, grid: Iterable[Array]) -> list[Array]:
    """The best minimum that the best starting points lead to, and others that are nearly as low."""
    low, high = problem.bounds()
    starts = list(grid)
    scored = sorted(
        (problem.huber(np.clip(y, low, high))[0], number) for number, y in enumerate(starts)
    )
    found = search(problem, [starts[number] for _, number in scored[:_REFINED]])
    kept: list[Array] = []
    for value, y in found:
        if value <= (1 + _RIVAL) * found[0][0] and all(
            np.abs(y - other).max() > 0.1 for other in kept
        ):
            kept.append(y)
    return kept[:_RESAMPLED]


def _refit(problem: Problem, part: Problem, minima: list[Array]) -> Array:
    """The best coordinates of resampled points, searched from the minima of all points."""
    return search(
        part, [part.coordinates(problem.coefficients(y)[0]) for y in minima], squares=12, rounds=1
    )[0][1]


def _intervals(
    problem: Problem, y: Array, draws: Sequence[SupervisedLaw | DistillationLaw], level: float
) -> dict[str, tuple[float, float]]:
    ends = expanded_quantiles(level, len(problem.n), len(problem.free))
    found = {}
    for name in problem.free:
        low, high = np.quantile([getattr(law, name) for law in draws], ends)
        found[name] = widen(problem, y, name, (float(low), float(high)), level)
    return found
