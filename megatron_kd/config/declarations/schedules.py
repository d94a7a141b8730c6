"""Declare the learning-rate and alpha schedules: name, help text and formula of each.

This is the only file that a new schedule touches. Write its formula, a function of the step, the
number of steps and the settings, and add it to the registry. The allowed values of the run-file
key and its `--help` text follow from the registry.

Formulas keep no state, so that a resumed run needs the step alone. `step` counts finished updates:
the first update of a run is step 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol


# The sections take their allowed values from here, so this file describes what it needs of them.
class OptimizerSettings(Protocol):
    """Describe the keys of [optimizer] that learning-rate formulas use."""

    @property
    def learning_rate(self) -> float: ...  # noqa: D102

    @property
    def min_learning_rate(self) -> float: ...  # noqa: D102

    @property
    def warmup_steps(self) -> int: ...  # noqa: D102

    @property
    def decay_steps(self) -> int: ...  # noqa: D102


class DistillSettings(Protocol):
    """Describe the keys of [distill] that formulas of alpha use."""

    @property
    def alpha(self) -> float: ...  # noqa: D102

    @property
    def alpha_period_fraction(self) -> float: ...  # noqa: D102

    @property
    def alpha_warmup_fraction(self) -> float: ...  # noqa: D102

    @property
    def alpha_decay_fraction(self) -> float: ...  # noqa: D102


@dataclass(frozen=True)
class LearningRateSchedule:
    """Describe the learning rate after the linear warm-up, which all schedules share.

    Attributes:
        description: Help text that follows the schedule's name.
        formula: Map (step, steps, section) to a learning rate, for step >= section.warmup_steps.
        uses_decay_steps: True if the schedule needs optimizer.decay_steps > 0.
    """

    description: str
    formula: Callable[[int, int, OptimizerSettings], float]
    uses_decay_steps: bool = False


@dataclass(frozen=True)
class AlphaSchedule:
    """Describe alpha, the weight of the distillation loss, over a run.

    Attributes:
        description: Help text that follows the schedule's name.
        formula: Map (step, steps, section) to alpha in [0, 1].
    """

    description: str
    formula: Callable[[int, int, DistillSettings], float]


def _progress(step: int, steps: int, start: int) -> float:
    """Return the share of the updates since `start` that are done after update `step`, at most 1.

    The last update of the run reaches 1.
    """
    return min(1.0, (step - start + 1) / max(1, steps - start))


def _cosine_from(start: int, step: int, steps: int, section: OptimizerSettings) -> float:
    peak, floor = section.learning_rate, section.min_learning_rate
    if step < start:
        return peak
    progress = _progress(step, steps, start)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _cosine(step: int, steps: int, section: OptimizerSettings) -> float:
    return _cosine_from(section.warmup_steps, step, steps, section)


def _linear(step: int, steps: int, section: OptimizerSettings) -> float:
    peak, floor = section.learning_rate, section.min_learning_rate
    return peak + (floor - peak) * _progress(step, steps, section.warmup_steps)


def _constant(step: int, steps: int, section: OptimizerSettings) -> float:
    return section.learning_rate


def _warmup_stable_decay(step: int, steps: int, section: OptimizerSettings) -> float:
    return _cosine_from(steps - section.decay_steps, step, steps, section)


LEARNING_RATE_SCHEDULES: dict[str, LearningRateSchedule] = {
    "cosine": LearningRateSchedule("cosine decay to min_learning_rate", _cosine),
    "linear": LearningRateSchedule("linear decay to min_learning_rate", _linear),
    "constant": LearningRateSchedule("no decay", _constant),
    "wsd": LearningRateSchedule(
        "stable, then cosine decay over the last decay_steps",
        _warmup_stable_decay,
        uses_decay_steps=True,
    ),
}


def _alpha_constant(step: int, steps: int, section: DistillSettings) -> float:
    return section.alpha


def _alpha_linear_up(step: int, steps: int, section: DistillSettings) -> float:
    return section.alpha * step / max(1, steps - 1)


def _alpha_linear_down(step: int, steps: int, section: DistillSettings) -> float:
    return section.alpha * (1.0 - step / max(1, steps - 1))


def _alpha_period(step: int, steps: int, section: DistillSettings) -> float:
    # Whole steps, so that no rounding moves the start of a half period.
    half = max(1, round(section.alpha_period_fraction * steps / 2))
    return section.alpha if step // half % 2 == 0 else 0.0


def _alpha_wsd(step: int, steps: int, section: DistillSettings) -> float:
    return section.alpha * _alpha_wsd_shape(step, steps, section)


def _alpha_wsd_ce(step: int, steps: int, section: DistillSettings) -> float:
    return 1.0 - section.alpha * _alpha_wsd_shape(step, steps, section)


def _alpha_wsd_shape(step: int, steps: int, section: DistillSettings) -> float:
    """Return linear warm-up to 1, a plateau, and cosine decay to 0."""
    warmup = round(section.alpha_warmup_fraction * steps)
    decay = round(section.alpha_decay_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    if step >= steps - decay:
        return 0.5 * (1.0 + math.cos(math.pi * (step - (steps - decay) + 1) / decay))
    return 1.0


# arXiv 2410.16215 names these schedules. It gives the shape of wsd only.
ALPHA_SCHEDULES: dict[str, AlphaSchedule] = {
    "constant": AlphaSchedule("alpha in every step", _alpha_constant),
    "linear_up": AlphaSchedule("0 to alpha", _alpha_linear_up),
    "linear_down": AlphaSchedule("alpha to 0", _alpha_linear_down),
    "period": AlphaSchedule(
        "alpha in the first half of every alpha_period_fraction of the steps, 0 in the second",
        _alpha_period,
    ),
    "wsd": AlphaSchedule("linear warm-up, stable at alpha, cosine decay to 0", _alpha_wsd),
    "wsd_ce": AlphaSchedule(
        "1 - alpha has the shape of wsd, up to the value of alpha", _alpha_wsd_ce
    ),
}


def describe_schedules(
    schedules: dict[str, LearningRateSchedule] | dict[str, AlphaSchedule],
) -> str:
    """Return the help text of a registry: "name: description" of each schedule."""
    return "; ".join(f"{name}: {schedule.description}" for name, schedule in schedules.items())


# Pydantic and --help read the allowed values from a Literal, which a type checker cannot compute.
if TYPE_CHECKING:
    LearningRateScheduleName = str
    AlphaScheduleName = str
else:
    LearningRateScheduleName = Literal[tuple(LEARNING_RATE_SCHEDULES)]
    AlphaScheduleName = Literal[tuple(ALPHA_SCHEDULES)]
