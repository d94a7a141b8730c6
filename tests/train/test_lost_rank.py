"""A rank that dies, stops or hangs while targets are exchanged: every other rank leaves in time and says which one it was."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.program import finish_ranks, start_ranks
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny, write_tokens
from tests.layouts.layouts import run_all
from tests.train.test_program import write_run

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

WORLD, LIMIT = 3, 15
BATCH = {"global_batch_size": WORLD, "micro_batch_size": 1}


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lost")
    tokens = write_tokens(folder)
    run_ranks(run_all, 1, [(tiny(folder / "teacher", tokens, batch=BATCH), 2, True)])
    own: dict[str, Any] = {
        "source": "online",
        "checkpoint": str(folder / "teacher"),
        "micro_batch_size": 1,
    }
    return write_run(
        folder,
        "run",
        tokens,
        batch=BATCH,
        teacher=own,
        distill={"top_k": 5},
        train={"timeout_seconds": float(LIMIT)},
    )


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("kill", "gives no sign of life since step "),
        pytest.param("stop", "gives no sign of life since step ", marks=pytest.mark.slow),
        pytest.param(
            "raise",
            "failed at step 3, waiting for targets of other ranks: ValueError: a shard of the data is gone",
            marks=pytest.mark.slow,
        ),
        pytest.param("sleep", "is still at step 3, packing targets, for ", marks=pytest.mark.slow),
    ],
)
@pytest.mark.fault(7)
def test_every_other_rank_names_it(
    run_file: Path, tmp_path: Path, mode: str, words: str, measured: Callable[[str], None]
) -> None:
    workers = start_ranks(
        WORLD,
        [mode, "--config", str(run_file), "--run.directory", str(tmp_path)],
        module="tests.train.faulty",
    )
    try:
        begun = wait_for_step(tmp_path, 2)
        for code, output in finish_ranks(workers[:-1]):
            assert code == 1, output
            assert (
                f"stopped: rank {WORLD - 1} (process {workers[-1].pid} on {socket.gethostname()}) {words}"
                in output
            ), output
        seconds = time.monotonic() - begun
        assert seconds < LIMIT + 3  # and the interpreter's way out
        measured(f"{mode}: the others ended after {seconds:.1f} s of {LIMIT}")
        status = json.loads((tmp_path / "status.json").read_text())
        assert (status["state"], status["step"]) == ("failed", 2)
        assert words in status["message"]
    finally:
        workers[-1].kill()
        finish_ranks(workers[-1:])


def wait_for_step(directory: Path, step: int) -> float:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        rows = directory / "metrics.jsonl"
        if rows.exists() and f'"step": {step},' in rows.read_text():
            return time.monotonic()
        time.sleep(0.05)
    raise AssertionError(f"no step {step} within 100 s")
