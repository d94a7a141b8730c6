"""Test the head with its elementwise operations compiled."""

from __future__ import annotations

import shutil

import pytest
import torch

from megatron_kd.head.logit_rows import compile_rows
from tests.losses.cases import (
    fresh_seed,
    hand_target,
    head_outcome,
    make_problem,
    reference_outcome,
    say,
    worst,
)

pytestmark = [
    pytest.mark.slow,  # a C++ compiler runs for half a minute
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_against_fp64(temperature: float) -> None:
    seed = fresh_seed()
    problem = make_problem(seed).rounded_to(torch.float32)
    target = hand_target(problem.teacher, top_k=8, temperature=temperature, dtype=torch.float32)
    scalars = dict(alpha=0.6, temperature=temperature, tail="bucket", z_loss=1e-2)
    expected = reference_outcome(problem, target, torch.ones(40), None, **scalars)
    compile_rows()
    try:
        for schedule in ("chunk", "save", "recompute"):
            actual = head_outcome(
                problem, target, torch.ones(40), None, schedule=schedule, chunk_tokens=17, **scalars
            )
            assert worst(actual, expected) < 1e-5, say(seed, schedule)
    finally:
        compile_rows(False)
