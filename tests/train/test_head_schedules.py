"""distill.head_schedule moves no number of a run, with a head of its own or tied to the embedding."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.tiny import write_tokens
from tests.train.test_program import command, finish, rows, start, write_run


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_schedules_train_alike(tied: bool, tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path, tokens=3000)
    found = {}
    for schedule in ("save", "chunk", "direct", "recompute"):
        config = write_run(
            tmp_path,
            schedule,
            tokens,
            model={"tied_embeddings": tied},
            distill={"head_schedule": schedule},
            train={"steps": 6},
        )
        code, output = finish(start(command(config)))
        assert code == 0, output
        found[schedule] = [
            (row["total_loss"], row["grad_norm"]) for row in rows(tmp_path / schedule)
        ]
    for schedule, losses in found.items():
        for ours, theirs in zip(losses, found["save"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5), schedule
