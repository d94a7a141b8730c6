"""Log-probabilities as small whole numbers.

An error e of the log-probability of an entry of probability p costs p e^2 / 2 nats of KL, so the step that costs every entry the
same is proportional to 1 / sqrt(p): equal steps of sqrt(p). With n of them from 0 to 1 an entry costs 1 / (6 n^2) nats on average,
and a token with K entries of mass m, whose distribution is p / m, at most K / (6 n^2 m). Where that step would be wider than 1/10
nat, the step is 1/10 nat: it keeps small probabilities good for what a loss at a higher temperature makes of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Ints = NDArray[np.int64]

MEAN_KL = 8.5e-5  # nats, between what is stored and what is read
STEPS_PER_NAT = 10
LEVELS = 1 << 16
MOST_STEPS = 50000  # leaves levels for every log-probability above -1500
SMALLEST_MASS = 1e-3  # below it a token does not make all others dearer


def steps_for(kept: Ints, mass: Singles) -> int:
    """The number n of steps of sqrt(p) that holds MEAN_KL for tokens with so many entries [S] of such mass [S]."""
    wanted = math.sqrt(float((kept / np.maximum(mass, SMALLEST_MASS)).mean()) / (6 * MEAN_KL))
    return min(math.ceil(wanted), MOST_STEPS)


@dataclass(frozen=True)
class Levels:
    """Levels rise as probabilities fall: 0 is p = 1. steps: n."""

    steps: int

    @property
    def _turn(self) -> tuple[float, float]:
        """sqrt(p) where both steps are as wide, and the (fractional) level there."""
        root = min(2 * STEPS_PER_NAT / self.steps, 1.0)
        return root, (1 - root) * self.steps

    def of(self, logprobs: Singles) -> Ints:
        """Levels of log-probabilities; those past the last one get the last one."""
        root, level = self._turn
        values = np.minimum(logprobs, 0).astype(np.float64)
        upper = (1 - np.exp(0.5 * values)) * self.steps
        lower = level + (2 * math.log(root) - values) * STEPS_PER_NAT
        return np.rint(np.minimum(np.where(upper < level, upper, lower), LEVELS - 1)).astype(
            np.int64
        )

    def table(self, most: int) -> tuple[Singles, Floats]:
        """Log-probabilities and probabilities of the levels from 0 to at least `most`."""
        return _table(self.steps, 1 << most.bit_length())


@lru_cache(maxsize=64)
def _table(steps: int, count: int) -> tuple[Singles, Floats]:
    root, turn = Levels(steps)._turn
    level = np.arange(count, dtype=np.float64)
    upper = 2 * np.log(np.maximum(1 - level / steps, root))
    logprobs = np.where(level < turn, upper, 2 * math.log(root) - (level - turn) / STEPS_PER_NAT)
    return logprobs.astype(np.float32), np.exp(logprobs)
