"""Test the head's gradients over tensor-parallel groups on the complete grid of settings.

In test_head_ranks.py the memory strategies and alphas take turns.
"""

from __future__ import annotations

from itertools import product

import pytest

from tests.helpers.ranks import run_ranks
from tests.layouts.head_cases import SIZES, grid_cases
from tests.layouts.head_ranks import run_everything
from tests.layouts.test_head_ranks import assembled
from tests.losses.cases import errors, fresh_seed, oracle_outcome, say


@pytest.mark.dist
@pytest.mark.slow
def test_every_tail_temperature_alpha_and_schedule() -> None:
    seed = fresh_seed()
    results = run_ranks(run_everything, 4, seed, True)
    worst = 0.0
    for size, split in product(SIZES, (False, True)):
        for index, case in enumerate(grid_cases(size, seed)):
            expected = oracle_outcome(
                case.problem, case.target, case.upstream, case.problem.mask, **case.scalars
            )
            for first_rank in range(0, 4, size):
                full = assembled(
                    [rank[size, split][index] for rank in results[first_rank : first_rank + size]],
                    sequence_parallel=split,
                )
                error = max(errors(full, expected).values())
                worst = max(worst, error)
                assert error < 1e-5, say(seed, size, split, case.label, error)
    assert worst > 0
