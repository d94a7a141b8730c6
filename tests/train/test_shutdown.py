"""Shut a run down gracefully: every rank saves after the same step, and a restart continues it."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.program import finish_ranks, start_ranks
from tests.helpers.tiny import write_tokens
from tests.train.test_program import RATES, read_metrics, write_run

pytestmark = [pytest.mark.dist, pytest.mark.alone, pytest.mark.timeout(300)]


def wait_for_step(directory: Path, step: int) -> None:
    deadline = time.monotonic() + 100
    metrics = directory / "metrics.jsonl"
    while time.monotonic() < deadline:
        if metrics.exists() and any(
            f'"step": {number},' in metrics.read_text() for number in range(step, step + 20)
        ):
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} within 100 s")


class Run:
    """Start and stop a run of two ranks."""

    def __init__(self, folder: Path, name: str, tokens: str) -> None:
        shared: dict[str, Any] = {
            "parallel": {"tensor": 2},
            "train": {"steps": 160, "evaluate_interval": 0},
            "checkpoint": {"interval": 0},
        }
        self.directory = folder / name
        self._config = write_run(folder, name, tokens, **shared)

    def start(self, *overrides: str) -> list[subprocess.Popen[str]]:
        return start_ranks(2, ["--config", str(self._config), *overrides])

    def finish(self, *overrides: str) -> list[int]:
        return [code for code, _ in finish_ranks(self.start(*overrides))]

    @property
    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads((self.directory / "status.json").read_text())
        return status

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in record.items() if key not in RATES}
            for record in read_metrics(self.directory)
        ]


@pytest.mark.slow
@pytest.mark.fault(4)
def test_every_shutdown_request(tmp_path: Path, measured: Callable[[str], None]) -> None:
    tokens = write_tokens(tmp_path, tokens=60_000)
    undisturbed, restarted = (Run(tmp_path, name, tokens) for name in ("undisturbed", "restarted"))
    assert undisturbed.finish() == [0, 0]
    signal_step = stop_by_signal_to_one_rank(restarted)
    file_step = stop_by_file(restarted, signal_step)
    # A time limit that is over at once: the run stops before another step.
    assert restarted.finish("--train.minutes", "0.0001") == [85, 85]
    assert restarted.status["step"] == file_step
    assert restarted.finish() == [0, 0]
    assert restarted.metrics == undisturbed.metrics
    assert len(undisturbed.metrics) == 160
    measured(
        f"stopped at steps {signal_step} (signal to one rank, 85) and {file_step} (file, 93), then "
        "at the limit; metrics identical"
    )


def stop_by_signal_to_one_rank(run: Run) -> int:
    workers = run.start()
    wait_for_step(run.directory, 20)
    workers[1].send_signal(signal.SIGUSR1)
    results = finish_ranks(workers)
    assert [code for code, _ in results] == [85, 85], results
    assert "saved and stopped: SIGUSR1 requested it" in results[1][1]
    assert "saved and stopped: another rank received a request" in results[0][1]
    status = run.status
    assert status["state"] == "requeue"
    assert 20 <= status["step"] < 160
    return int(status["step"])


def stop_by_file(run: Run, last_step: int) -> int:
    """Stop with a stop file, which the run removes."""
    workers = run.start()
    wait_for_step(run.directory, last_step + 10)
    (run.directory / "stop").touch()
    results = finish_ranks(workers)
    assert [code for code, _ in results] == [93, 93], results
    status = run.status
    assert status["state"] == "stopped"
    assert status["step"] > last_step
    assert not (run.directory / "stop").exists()
    return int(status["step"])
