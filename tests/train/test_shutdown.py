"""A run that is asked to leave: every rank saves and goes after the same step, and started again it is as if nothing had happened."""

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


def status(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "status.json").read_text())
    return found


def wait_for_step(directory: Path, step: int) -> None:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        found = directory / "metrics.jsonl"
        if found.exists() and any(
            f'"step": {number},' in found.read_text() for number in range(step, step + 20)
        ):
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} within 100 s")


@pytest.mark.slow
@pytest.mark.fault(4)
def test_every_way_of_leaving(tmp_path: Path, measured: Callable[[str], None]) -> None:
    tokens = write_tokens(tmp_path, tokens=60_000)
    shared: dict[str, Any] = {
        "parallel": {"tensor": 2},
        "train": {"steps": 160, "evaluate_interval": 0},
        "checkpoint": {"interval": 0},
    }
    whole, broken = (write_run(tmp_path, name, tokens, **shared) for name in ("whole", "broken"))
    directory = tmp_path / "broken"
    assert [code for code, _ in finish_ranks(start_ranks(2, ["--config", str(whole)]))] == [0, 0]

    # A signal to one rank only.
    workers = start_ranks(2, ["--config", str(broken)])
    wait_for_step(directory, 20)
    workers[1].send_signal(signal.SIGUSR1)
    ended = finish_ranks(workers)
    assert [code for code, _ in ended] == [85, 85], ended
    assert "saved and stopped: SIGUSR1 requested it" in ended[1][1]
    assert "saved and stopped: another rank received a request" in ended[0][1]
    first = status(directory)
    assert first["state"] == "requeue"
    assert 20 <= first["step"] < 160

    # A file, which is heeded once.
    workers = start_ranks(2, ["--config", str(broken)])
    wait_for_step(directory, first["step"] + 10)
    (directory / "stop").touch()
    ended = finish_ranks(workers)
    assert [code for code, _ in ended] == [93, 93], ended
    second = status(directory)
    assert second["state"] == "stopped"
    assert second["step"] > first["step"]
    assert not (directory / "stop").exists()

    # A limit that is over at once: it leaves before another step, and has nothing to save.
    ended = finish_ranks(start_ranks(2, ["--config", str(broken), "--train.minutes", "0.0001"]))
    assert [code for code, _ in ended] == [85, 85]
    assert status(directory)["step"] == second["step"]

    assert [code for code, _ in finish_ranks(start_ranks(2, ["--config", str(broken)]))] == [0, 0]
    same, wanted = (
        [
            {key: value for key, value in row.items() if key not in RATES}
            for row in rows(tmp_path / name)
        ]
        for name in ("broken", "whole")
    )
    assert same == wanted
    assert len(wanted) == 160
    measured(
        f"left at steps {first['step']} (signal to one rank, 85) and {second['step']} (file, 93), then at the limit; rows identical"
    )
