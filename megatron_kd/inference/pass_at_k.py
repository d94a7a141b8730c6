"""How often at least one of k samples is right, from n samples of which c were.

pass@k = 1 - C(n - c, k) / C(n, k): the share of all choices of k of the n samples that hold a right one. Its mean is 1 - (1 - p)^k where
each sample is right with probability p (arXiv 2107.03374); that of 1 - (1 - c/n)^k is lower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def pass_at_k(samples: int, right: int, k: int) -> float:
    """pass@k of one problem, in [0, 1].

    Args:
        samples: n, all samples that were drawn.
        right: c of them, in [0, samples].
        k: in [1, samples].

    Raises:
        ValueError: a number outside its range.
    """
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(
            f"pass@{k} of {right} right samples among {samples}: needs 0 <= right <= samples and 1 <= k <= samples"
        )
    choices = math.comb(samples, k)
    # Whole numbers up to the one division: nothing is lost where both are huge.
    return (choices - math.comb(samples - right, k)) / choices


def mean_pass_at_k(samples: int, right: Sequence[int], k: int) -> float:
    """Mean over problems, `samples` drawn of each and right[i] of the i-th right. ValueError without problems."""
    if not right:
        raise ValueError("pass@k is a mean over problems, and there are none")
    return sum(pass_at_k(samples, count, k) for count in right) / len(right)
