"""pass@k against all choices, by hand, and against what it estimates."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_kd.inference.pass_at_k import mean_pass_at_k, pass_at_k
from tests.losses.cases import fresh_seed


def test_by_hand() -> None:
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == 0.5  # of six pairs, three hold the right one
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)
    assert pass_at_k(4, 0, 4) == 0.0
    assert pass_at_k(4, 4, 1) == 1.0
    assert pass_at_k(4, 1, 4) == 1.0
    assert pass_at_k(5000, 1, 2500) == 0.5  # numbers of choices that no float holds
    assert mean_pass_at_k(4, [1, 2, 0], 2) == pytest.approx((1 / 2 + 5 / 6) / 3)


def test_is_the_share_of_all_choices() -> None:
    for samples in range(1, 9):
        for right in range(samples + 1):
            marks = [1] * right + [0] * (samples - right)
            for k in range(1, samples + 1):
                choices = list(itertools.combinations(marks, k))
                assert pass_at_k(samples, right, k) == pytest.approx(
                    sum(map(any, choices)) / len(choices), abs=1e-12
                )


def test_is_unbiased() -> None:
    """Its mean over all counts that 32 draws of one probability can give is 1 - (1 - p)^k; that of 1 - (1 - c/n)^k is not."""
    rng = np.random.default_rng(fresh_seed())
    for p in rng.uniform(0.05, 0.6, 5):
        chance = [math.comb(32, c) * p**c * (1 - p) ** (32 - c) for c in range(33)]
        for k in (1, 4, 16, 32):
            assert sum(w * pass_at_k(32, c, k) for c, w in enumerate(chance)) == pytest.approx(
                1 - (1 - p) ** k, abs=1e-9
            )
    assert sum(w * (1 - (1 - c / 32) ** 16) for c, w in enumerate(chance)) != pytest.approx(
        1 - (1 - p) ** 16, abs=1e-6
    )


@pytest.mark.parametrize("numbers", [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5), (0, 0, 1)])
def test_numbers_out_of_range(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="needs 0 <= right <= samples and 1 <= k <= samples"):
        pass_at_k(*numbers)
    with pytest.raises(ValueError, match="there are none"):
        mean_pass_at_k(4, [], 1)
