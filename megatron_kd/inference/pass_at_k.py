"""Estimate pass@k, the probability that at least one of k samples is correct.

From n samples of a problem, c of them correct, the estimate is 1 - C(n - c, k) / C(n, k): the share
of all choices of k samples that contain a correct one. Its mean is 1 - (1 - p)^k if each sample is
correct with probability p (arXiv 2107.03374). The mean of 1 - (1 - c/n)^k is lower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Return pass@k of one problem, in [0, 1].

    Args:
        samples: Number n of samples.
        correct: Number c of correct ones, in [0, samples].
        k: Samples of a choice, in [1, samples].

    Raises:
        ValueError: A number is outside its range.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(
            f"pass@{k} of {correct} correct samples among {samples}: needs 0 <= correct <= samples "
            "and 1 <= k <= samples"
        )
    choices = math.comb(samples, k)
    # Integers up to the one division, so that no precision is lost if both are huge.
    return (choices - math.comb(samples - correct, k)) / choices


def mean_pass_at_k(samples: int, correct: Sequence[int], k: int) -> float:
    """Return the mean of pass@k over problems.

    Args:
        samples: Number of samples of each problem.
        correct: Number of correct samples of each problem.
        k: Samples of a choice, in [1, samples].

    Raises:
        ValueError: There are no problems, or a number is outside its range.
    """
    if not correct:
        raise ValueError("pass@k is a mean over problems, and there are none")
    return sum(pass_at_k(samples, count, k) for count in correct) / len(correct)
