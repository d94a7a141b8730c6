"""Test that alpha = 0 is megatron-core's vocabulary-parallel cross-entropy."""

from __future__ import annotations

import pytest

from tests.helpers.ranks import run_ranks
from tests.layouts.mcore_ranks import compare
from tests.losses.cases import fresh_seed, say


@pytest.mark.dist
def test_alpha_zero_is_megatrons_cross_entropy() -> None:
    seed = fresh_seed()
    for errors in run_ranks(compare, 2, seed):
        assert max(errors.values()) < 2e-6, say(seed, errors)
