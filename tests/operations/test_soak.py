"""Random kills for some minutes: `pytest -m slow tests/operations/test_soak.py --soak 30` (1).

Two ranks train a tensor-parallel student. Again and again one rank or all are killed, stopped, or
asked to stop, at random moments, saves included, and the same command is started again. A run
survives if its metrics and weights are bitwise those of an undisturbed run. A complete checkpoint
that is gone or damaged afterwards is a loss.
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.fault_runs import intact_steps, state_digests
from tests.helpers.program import finish_ranks, start_ranks
from tests.helpers.tiny import write_tokens
from tests.losses.cases import fresh_seed
from tests.train.test_program import RATES, read_metrics, write_run

Ranks = list[subprocess.Popen[str]]
STEPS, INTERVAL = 600, 25


def kill_one(ranks: Ranks, draw: random.Random) -> None:
    draw.choice(ranks).kill()


def kill_all(ranks: Ranks, draw: random.Random) -> None:
    for rank in ranks:
        rank.kill()


def stop_one(ranks: Ranks, draw: random.Random) -> None:
    """Stop a rank, as a machine that hangs. The other one ends by itself."""
    draw.choice(ranks).send_signal(signal.SIGSTOP)


def request_stop(ranks: Ranks, draw: random.Random) -> None:
    draw.choice(ranks).send_signal(draw.choice([signal.SIGUSR1, signal.SIGTERM]))


BLOWS: dict[str, Callable[[Ranks, random.Random], None]] = {
    function.__name__: function for function in (kill_one, kill_all, stop_one, request_stop)
}


def wait(ranks: Ranks, seconds: float) -> bool:
    """Return True if all ranks end within `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if all(rank.poll() is not None for rank in ranks):
            return True
        time.sleep(0.01)
    return False


def strike(run: Path, directory: Path, draw: random.Random, longest: float) -> str:
    """Start the run and disturb it; return how, or "" if it finished before.

    All checkpoints are intact afterwards.
    """
    before = intact_steps(directory)
    later = ["--checkpoint.asynchronous", draw.choice(["true", "false"])]
    ranks = start_ranks(2, ["--config", str(run), *later])
    blow = ""
    try:
        if not wait(ranks, draw.uniform(0, longest)):
            blow = draw.choice(list(BLOWS))
            BLOWS[blow](ranks, draw)
            wait(ranks, 25)
    finally:
        for rank in ranks:
            rank.kill()  # a stopped one does not end by itself
        codes = [code for code, _ in finish_ranks(ranks)]
    assert blow or codes == [0, 0], codes
    after = intact_steps(directory)
    assert (after[-1] if after else 0) >= (before[-1] if before else 0), (blow, before, after)
    return blow


def finish_undisturbed(run: Path) -> list[int]:
    """Run to the end; return the exit codes."""
    ranks = start_ranks(2, ["--config", str(run)])
    return [code for code, _ in finish_ranks(ranks, timeout=600)]


def curve(directory: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run without its rates."""
    return [
        {key: value for key, value in record.items() if key not in RATES}
        for record in read_metrics(directory)
    ]


def disturb(
    run: Path, directory: Path, draw: random.Random, longest: float, deadline: float, seed: int
) -> list[str]:
    """Disturb a run until it finishes, undisturbed once time is up; return the blows."""
    blows: list[str] = []
    while blow := strike(run, directory, draw, longest):
        blows.append(blow)
        if time.monotonic() >= deadline:
            assert finish_undisturbed(run) == [0, 0], seed
            break
    return blows


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.fault(1, 2, 4, 7)
@pytest.mark.timeout(0)
def test_soak(
    tmp_path: Path, request: pytest.FixtureRequest, measured: Callable[[str], None]
) -> None:
    minutes = float(request.config.getoption("--soak"))
    seed = fresh_seed()
    draw = random.Random(seed)
    tokens = write_tokens(tmp_path, tokens=60_000)
    settings = {
        "parallel": {"tensor": 2},
        "train": {"steps": STEPS, "evaluate_interval": 0, "timeout_seconds": 10},
        "checkpoint": {"interval": INTERVAL, "keep_last": 2},
    }
    undisturbed = write_run(tmp_path, "undisturbed", tokens, **settings)
    start = time.monotonic()
    assert finish_undisturbed(undisturbed) == [0, 0]
    longest = 1.2 * (time.monotonic() - start)
    expected = curve(tmp_path / "undisturbed")

    blows: Counter[str] = Counter()
    survived = 0
    deadline = time.monotonic() + 60 * minutes
    while time.monotonic() < deadline:
        name = f"run{survived}"
        run = write_run(tmp_path, name, tokens, **settings)
        blows.update(disturb(run, tmp_path / name, draw, longest / 2, deadline, seed))
        metrics = curve(tmp_path / name)
        assert metrics == expected, (seed, name)
        assert state_digests(tmp_path / name, STEPS) == state_digests(
            tmp_path / "undisturbed", STEPS
        ), (
            seed,
            name,
        )
        survived += 1
    summary = ", ".join(
        f"{count} {blow.replace('_', ' ')}" for blow, count in sorted(blows.items())
    )
    measured(
        f"{minutes:g} minutes, {sum(blows.values())} blows ({summary}), "
        f"{survived} runs to their end, 0 lost"
    )
    print(f"seed {seed}: {minutes:g} minutes, {summary}; survived {survived}, lost 0")
