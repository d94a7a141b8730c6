"""Let a rank die, stop or hang while targets are exchanged: all other ranks end and name it."""

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

pytestmark = [pytest.mark.dist, pytest.mark.alone, pytest.mark.timeout(300)]

WORLD, LIMIT_SECONDS = 3, 15
BATCH = {"global_batch_size": WORLD, "micro_batch_size": 1}


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lost")
    tokens = write_tokens(folder)
    run_ranks(run_all, 1, [(tiny(folder / "teacher", tokens, batch=BATCH), 2, True)])
    teacher: dict[str, Any] = {
        "source": "online",
        "checkpoint": str(folder / "teacher"),
        "micro_batch_size": 1,
    }
    return write_run(
        folder,
        "run",
        tokens,
        batch=BATCH,
        teacher=teacher,
        distill={"top_k": 5},
        train={"timeout_seconds": float(LIMIT_SECONDS)},
    )


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("kill", "gives no sign of life since step "),
        pytest.param("stop", "gives no sign of life since step ", marks=pytest.mark.slow),
        pytest.param(
            "raise",
            "failed at step 3, waiting for targets of other ranks: "
            "ValueError: a shard of the data is gone",
            marks=pytest.mark.slow,
        ),
        pytest.param("sleep", "is still at step 3, packing targets, for ", marks=pytest.mark.slow),
    ],
)
@pytest.mark.fault(7)
def test_every_other_rank_names_it(
    run_file: Path, tmp_path: Path, mode: str, message: str, measured: Callable[[str], None]
) -> None:
    workers = start_ranks(
        WORLD,
        [mode, "--config", str(run_file), "--run.directory", str(tmp_path)],
        module="tests.train.faulty",
    )
    lost_rank = f"rank {WORLD - 1} (process {workers[-1].pid} on {socket.gethostname()})"
    try:
        begin = wait_for_step(tmp_path, 2)
        for code, output in finish_ranks(workers[:-1]):
            assert code == 1, output
            assert f"stopped: {lost_rank} {message}" in output, output
        seconds = time.monotonic() - begin
        assert seconds < LIMIT_SECONDS + 3  # and the end of the interpreter
        measured(f"{mode}: the others ended after {seconds:.1f} s of {LIMIT_SECONDS}")
        status = json.loads((tmp_path / "status.json").read_text())
        assert (status["state"], status["step"]) == ("failed", 2)
        assert message in status["message"]
    finally:
        workers[-1].kill()
        finish_ranks(workers[-1:])


def wait_for_step(directory: Path, step: int) -> float:
    """Wait until the step is logged, and return the time."""
    deadline = time.monotonic() + 100
    metrics = directory / "metrics.jsonl"
    while time.monotonic() < deadline:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return time.monotonic()
        time.sleep(0.05)
    raise AssertionError(f"no step {step} within 100 s")
