"""Train with each memory strategy of the head: no number of a run changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.tiny import write_tokens
from tests.train.test_program import command, finish, read_metrics, start, write_run

STRATEGIES = ("save", "chunk", "direct", "recompute")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_strategies_train_alike(tied: bool, tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path, tokens=3000)
    numbers = {}
    for strategy in STRATEGIES:
        config = write_run(
            tmp_path,
            strategy,
            tokens,
            model={"tied_embeddings": tied},
            distill={"head_schedule": strategy},
            train={"steps": 6},
        )
        code, output = finish(start(command(config)))
        assert code == 0, output
        numbers[strategy] = [
            (record["total_loss"], record["grad_norm"])
            for record in read_metrics(tmp_path / strategy)
        ]
    for strategy in STRATEGIES:
        for step_numbers, reference in zip(numbers[strategy], numbers["save"], strict=True):
            assert step_numbers == pytest.approx(reference, rel=1e-5), strategy
