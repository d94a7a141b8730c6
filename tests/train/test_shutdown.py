"""Shut a run down gracefully: every rank saves after the same step, and a restart continues it."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.program import finish_ranks, start_ranks
from tests.helpers.tiny import write_tokens
from tests.train.test_program import RATES, rows, write_run

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]


def read_status(directory: Path) -> dict[str, Any]:
    status: dict[str, Any] = json.loads((directory / "status.json").read_text())
    return status


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


@pytest.mark.slow
@pytest.mark.fault(4)
def test_every_shutdown_request(tmp_path: Path, measured: Callable[[str], None]) -> None:
    tokens = write_tokens(tmp_path, tokens=60_000)
    shared: dict[str, Any] = {
        "parallel": {"tensor": 2},
        "train": {"steps": 160, "evaluate_interval": 0},
        "checkpoint": {"interval": 0},
    }
    undisturbed, restarted = (
        write_run(tmp_path, name, tokens, **shared) for name in ("undisturbed", "restarted")
    )
    directory = tmp_path / "restarted"
    ended = finish_ranks(start_ranks(2, ["--config", str(undisturbed)]))
    assert [code for code, _ in ended] == [0, 0]

    # A signal to one rank only.
    workers = start_ranks(2, ["--config", str(restarted)])
    wait_for_step(directory, 20)
    workers[1].send_signal(signal.SIGUSR1)
    ended = finish_ranks(workers)
    assert [code for code, _ in ended] == [85, 85], ended
    assert "saved and stopped: SIGUSR1 requested it" in ended[1][1]
    assert "saved and stopped: another rank received a request" in ended[0][1]
    first = read_status(directory)
    assert first["state"] == "requeue"
    assert 20 <= first["step"] < 160

    # A stop file, which is removed.
    workers = start_ranks(2, ["--config", str(restarted)])
    wait_for_step(directory, first["step"] + 10)
    (directory / "stop").touch()
    ended = finish_ranks(workers)
    assert [code for code, _ in ended] == [93, 93], ended
    second = read_status(directory)
    assert second["state"] == "stopped"
    assert second["step"] > first["step"]
    assert not (directory / "stop").exists()

    # A time limit that is over at once: the run stops before another step.
    ended = finish_ranks(start_ranks(2, ["--config", str(restarted), "--train.minutes", "0.0001"]))
    assert [code for code, _ in ended] == [85, 85]
    assert read_status(directory)["step"] == second["step"]

    ended = finish_ranks(start_ranks(2, ["--config", str(restarted)]))
    assert [code for code, _ in ended] == [0, 0]
    metrics, undisturbed_metrics = (
        [
            {key: value for key, value in record.items() if key not in RATES}
            for record in rows(tmp_path / name)
        ]
        for name in ("restarted", "undisturbed")
    )
    assert metrics == undisturbed_metrics
    assert len(undisturbed_metrics) == 160
    measured(
        f"stopped at steps {first['step']} (signal to one rank, 85) and {second['step']} (file, "
        "93), then at the limit; metrics identical"
    )
