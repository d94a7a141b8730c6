"""Quantize log-probabilities to levels, which are small integers.

An error e of the log-probability of an entry of probability p costs p e^2 / 2 nats of KL, so the
step that costs every entry the same is proportional to 1 / sqrt(p): equal steps of sqrt(p). With n
of them from 0 to 1 an entry costs 1 / (6 n^2) nats on average, and a token with K entries of mass
m, whose distribution is p / m, at most K / (6 n^2 m). Where that step would be wider than 1/10 nat,
the step is 1/10 nat: it keeps small probabilities accurate for a loss at a higher temperature.
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

MEAN_KL = 8.5e-5  # Nats, between the stored and the decoded distribution.
STEPS_PER_NAT = 10
LEVELS = 1 << 16
MAX_STEPS = 50000  # Leaves levels for every log-probability above -1500.
SMALLEST_MASS = 1e-3  # A token of less mass does not raise the number of steps further.


def steps_for(kept: Ints, mass: Singles) -> int:
    """Return the number n of steps of sqrt(p) that keeps the mean KL at MEAN_KL.

    Args:
        kept: [S], entries of each token.
        mass: [S], kept mass of each token.
    """
    steps = math.sqrt(float((kept / np.maximum(mass, SMALLEST_MASS)).mean()) / (6 * MEAN_KL))
    return min(math.ceil(steps), MAX_STEPS)


@dataclass(frozen=True)
class Levels:
    """Convert between log-probabilities and levels, which rise as probabilities fall; 0 is p = 1.

    Attributes:
        steps: n, the number of steps of sqrt(p).
    """

    steps: int

    @property
    def _turn(self) -> tuple[float, float]:
        """Return sqrt(p) where both kinds of steps are equally wide, and the level there."""
        root = min(2 * STEPS_PER_NAT / self.steps, 1.0)
        return root, (1 - root) * self.steps

    def encode(self, logprobs: Singles) -> Ints:
        """Return the levels of log-probabilities; those past the last level get the last one."""
        root, level = self._turn
        values = np.minimum(logprobs, 0).astype(np.float64)
        upper = (1 - np.exp(0.5 * values)) * self.steps
        lower = level + (2 * math.log(root) - values) * STEPS_PER_NAT
        return np.rint(np.minimum(np.where(upper < level, upper, lower), LEVELS - 1)).astype(
            np.int64
        )

    def table(self, largest: int) -> tuple[Singles, Floats]:
        """Return log-probabilities and probabilities of the levels from 0 to at least `largest`."""
        return _table(self.steps, 1 << largest.bit_length())


@lru_cache(maxsize=64)
def _table(steps: int, count: int) -> tuple[Singles, Floats]:
    root, turn = Levels(steps)._turn
    level = np.arange(count, dtype=np.float64)
    upper = 2 * np.log(np.maximum(1 - level / steps, root))
    logprobs = np.where(level < turn, upper, 2 * math.log(root) - (level - turn) / STEPS_PER_NAT)
    return logprobs.astype(np.float32), np.exp(logprobs)
