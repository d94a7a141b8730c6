"""Compare pass@k with values by hand, with all choices, and with the probability it estimates."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_kd.inference.pass_at_k import mean_pass_at_k, pass_at_k
from tests.losses.cases import fresh_seed


def test_values_by_hand() -> None:
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == 0.5  # of six pairs, three contain the correct sample
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)
    assert pass_at_k(4, 0, 4) == 0.0
    assert pass_at_k(4, 4, 1) == 1.0
    assert pass_at_k(4, 1, 4) == 1.0
    assert pass_at_k(5000, 1, 2500) == 0.5  # the numbers of choices exceed a float
    assert mean_pass_at_k(4, [1, 2, 0], 2) == pytest.approx((1 / 2 + 5 / 6) / 3)


def test_pass_at_k_is_the_share_of_all_choices() -> None:
    for samples in range(1, 9):
        for correct in range(samples + 1):
            marks = [1] * correct + [0] * (samples - correct)
            for k in range(1, samples + 1):
                choices = list(itertools.combinations(marks, k))
                assert pass_at_k(samples, correct, k) == pytest.approx(
                    sum(map(any, choices)) / len(choices), abs=1e-12
                )


def test_pass_at_k_is_unbiased() -> None:
    """Average over all counts that 32 samples of one probability can give.

    The mean is 1 - (1 - p)^k. That of 1 - (1 - c/n)^k is not.
    """
    rng = np.random.default_rng(fresh_seed())
    for p in rng.uniform(0.05, 0.6, 5):
        weights = [math.comb(32, c) * p**c * (1 - p) ** (32 - c) for c in range(33)]
        for k in (1, 4, 16, 32):
            mean = sum(weight * pass_at_k(32, c, k) for c, weight in enumerate(weights))
            assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-9)
    biased = sum(weight * (1 - (1 - c / 32) ** 16) for c, weight in enumerate(weights))
    assert biased != pytest.approx(1 - (1 - p) ** 16, abs=1e-6)


@pytest.mark.parametrize("numbers", [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5), (0, 0, 1)])
def test_numbers_out_of_range(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="needs 0 <= correct <= samples and 1 <= k <= samples"):
        pass_at_k(*numbers)


def test_mean_without_problems() -> None:
    with pytest.raises(ValueError, match="there are none"):
        mean_pass_at_k(4, [], 1)
