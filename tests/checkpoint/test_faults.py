"""Test checkpoints under faults.

The faults are kills at every phase, full and slow disks, damage, payloads, a second run, and a
termination signal.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_kd.checkpoint.store import complete_steps
from tests.checkpoint.fault_cases import PAYLOADS, STEPS, Runs, run_all, write_run
from tests.checkpoint.fault_runs import (
    events,
    intact_steps,
    killed_at_call,
    killed_in_time,
    main,
    small_disk,
    state_digests,
)
from tests.helpers.forks import in_forks
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import write_tokens

pytestmark = [pytest.mark.dist, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_all(tmp_path_factory.mktemp("faults"))


@pytest.mark.fault("S1", "S2")
def test_asynchronous_writes_the_same_files(runs: Runs) -> None:
    assert runs.codes("whole", "later") == [0, 0], runs.ended["later"].output
    for step in range(2, STEPS + 1, 2):
        assert state_digests(runs.folder / "whole", step) == state_digests(
            runs.folder / "later", step
        ), step
    assert intact_steps(runs.folder / "later") == list(range(2, STEPS + 1, 2))
    rows = events(runs.folder / "later")
    assert {row["event"] for row in rows} == {"saved", "verified"}
    assert rows[-1]["event"] == "verified"
    assert rows[-1]["step"] == STEPS


@pytest.mark.fault(1, 2)
@pytest.mark.fault("S6")
def test_killed_at_any_moment(runs: Runs, measured: Callable[[str], None]) -> None:
    """Check that visible checkpoints are intact, complete ones stay, and the result is the same.

    It is that of a run that was not disturbed.
    """
    steps_after_kill = [runs.ended[f"look{number}"].value for number in range(8)]
    assert all(steps is not None for steps in steps_after_kill), [
        runs.ended[f"look{number}"].output for number in range(8)
    ]
    newest = [steps[-1] if steps else 0 for steps in steps_after_kill]
    assert newest == sorted(newest), (
        runs.seed,
        newest,
        runs.ended["killed"].output,
    )
    assert runs.codes("killed") == [0], (
        runs.seed,
        newest,
        runs.ended["killed"].output,
    )
    signals = runs.codes(*(f"{kind}{number}" for kind in ("call", "time") for number in range(4)))
    assert signals.count(-signal.SIGKILL) >= 2, (runs.seed, signals)
    measured(
        f"{signals.count(-signal.SIGKILL)} kills, newest complete step after each try {newest}, "
        "end bit-identical"
    )
    assert state_digests(runs.folder / "killed", STEPS) == state_digests(
        runs.folder / "whole", STEPS
    ), runs.seed
    assert sorted(path.name for path in (runs.folder / "killed/checkpoints").iterdir()) == [
        "step-00000011",
        "step-00000012",
    ], runs.seed


@pytest.mark.fault(5)
def test_damaged_checkpoints_are_skipped(runs: Runs) -> None:
    output = runs.ended["damaged"].output
    assert runs.codes("damaged") == [0], output
    assert runs.codes("stop") == [-signal.SIGKILL], output
    assert "the checkpoint of step 6 is damaged and skipped" in output, output
    assert "__0_0.distcp has SHA-256" in output, output
    assert "the checkpoint of step 4 is damaged" in output
    assert "resuming from the checkpoint of step 2" in output
    assert state_digests(runs.folder / "whole", STEPS).keys() == {"__0_0.distcp", "common.pt"}
    checkpoints = runs.folder / "damaged/checkpoints"
    names = {path.name for path in checkpoints.iterdir()}
    assert {"damaged-step-00000006", "damaged-step-00000004"} <= names
    # After replaying from step 2 the data is that of the undisturbed run; the test has changed
    # common.pt since.
    data = "__0_0.distcp"
    assert (
        state_digests(runs.folder / "damaged", STEPS)[data]
        == state_digests(runs.folder / "whole", STEPS)[data]
    )


@pytest.mark.fault(5)
def test_all_are_damaged(runs: Runs) -> None:
    messages = [
        line
        for line in runs.ended["none good"].output.splitlines()
        if "no checkpoint is intact" in line
    ]
    assert runs.codes("none good") == [2], runs.ended["none good"].output
    assert len(messages) == 1, runs.ended["none good"].output
    assert all(f"step {step}: " in messages[0] for step in range(2, STEPS + 1, 2))
    assert complete_steps(runs.folder / "damaged/checkpoints")


@pytest.mark.fault(6)
def test_full_disk(runs: Runs) -> None:
    for name in ("full", "full later"):
        output = runs.ended[name].output
        messages = [
            line for line in output.splitlines() if line.startswith("megatron_kd: stopped:")
        ]
        assert runs.codes(name) == [5], output
        assert len(messages) == 1, output
        assert "Traceback" not in output, output
        assert "__0_0.distcp: File too large" in messages[0], messages
        assert "the checkpoint of step 6 is untouched" in messages[0], messages
    assert intact_steps(runs.folder / "full") == [2, 4, 6]
    assert not list((runs.folder / "full/checkpoints").glob(".*"))
    status = json.loads((runs.folder / "full/status.json").read_text())
    assert status["state"] == "stopped"
    assert "could not be written" in status["message"]


@pytest.mark.fault(6)
def test_room_for_no_further_checkpoint(runs: Runs) -> None:
    """Check the error before anything is written, and a warning while one checkpoint fits."""
    output = runs.ended["no room"].output
    assert runs.codes("no room", "tight") == [5, 0], output
    assert "GB are free: make room" in output, output
    assert "the checkpoint of step 2 is untouched" in output, output
    assert intact_steps(runs.folder / "no room") == [2]
    assert not list((runs.folder / "no room/checkpoints").glob(".*"))
    assert runs.ended["tight"].output.count("room for this checkpoint and no other") == 1, (
        runs.ended["tight"].output
    )


@pytest.mark.fault(6)
def test_folder_that_cannot_be_made(runs: Runs) -> None:
    output = runs.ended["blocked"].output
    assert runs.codes("blocked") == [5], output
    assert "there is no earlier one" in output, output
    assert "Traceback" not in output, output


@pytest.mark.fault("S3")
def test_save_that_takes_too_long(runs: Runs) -> None:
    output = runs.ended["slow"].output
    words = r"writing to a slow disk has taken 0\.\d s, more than checkpoint.timeout_seconds = 0.2"
    assert runs.codes("slow") == [5], output
    assert re.search(words, output), output
    assert complete_steps(runs.folder / "slow/checkpoints") == [], output


@pytest.mark.fault(4)
def test_shutdown_waits_for_the_save(runs: Runs) -> None:
    """Request a shutdown during a save.

    That checkpoint and the last one are complete, and nothing is unfinished.
    """
    assert runs.codes("leave") == [85], runs.ended["leave"].output
    assert json.loads((runs.folder / "leave/status.json").read_text())["step"] == 5
    assert intact_steps(runs.folder / "leave") == [2, 4, 5]
    assert not list((runs.folder / "leave/checkpoints").glob(".*"))
    assert "could not be read back" not in runs.ended["leave"].output


def test_run_that_stops_completes_the_save(runs: Runs) -> None:
    assert runs.codes("nan") == [93], runs.ended["nan"].output
    last = json.loads((runs.folder / "nan/status.json").read_text())["step"]
    assert intact_steps(runs.folder / "nan")[-1] == last - 1 > 0


@pytest.mark.fault(15)
def test_second_run_is_refused(runs: Runs) -> None:
    pid, while_held, afterwards = runs.ended["held"].value
    output = runs.ended["held"].output
    assert (while_held, afterwards) == (2, 0), output
    assert f"is held by process {pid} of " in output
    assert f"was locked by process {pid} of " in output
    assert "which no longer runs: continuing" in output


@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.fault(12, 13)
def test_code_in_a_checkpoint_does_not_run(runs: Runs, name: str) -> None:
    assert runs.codes(f"before {name}", f"payload {name}") == [-signal.SIGKILL, 2], runs.ended[
        f"payload {name}"
    ].output
    assert runs.ended[f"poison {name}"].output == ""
    assert PAYLOADS[name] in runs.ended[f"payload {name}"].output
    assert not (runs.folder / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["false", "true"])
@pytest.mark.fault(6)
def test_disk_that_is_full(tmp_path: Path, asynchronous: str) -> None:
    """Fill a real disk, on which metrics.jsonl and status.json find no room either.

    It is detected in time, filled by others meanwhile, or too small for the first checkpoint, whose
    size is unknown.
    """
    path = write_run(
        tmp_path,
        write_tokens(tmp_path),
        "full",
        checkpoint={"interval": 3},
        data={"index_cache": str(tmp_path / "index")},
    )
    detected, failed = "GB are free: make room", "No space left on device"
    for kibibytes, deceived, steps, message in (
        (2500, False, [3, 6, 9], detected),
        (2500, True, [3, 6, 9], failed),
        (740, False, [], failed),
    ):
        arguments = (
            path,
            kibibytes,
            deceived,
            tmp_path / "full",
            "--checkpoint.asynchronous",
            asynchronous,
        )
        (ended,) = run_ranks(in_forks, 1, [(small_disk, arguments)])[0]
        if ended.value is None:
            pytest.skip(f"no file system can be mounted here: {ended.output[-300:]}")
        assert ended.value == (5, steps), ended
        assert message in ended.output, ended
        assert "Traceback" not in ended.output


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.fault(1, 2)
def test_killed_at_every_phase(runs: Runs, tmp_path: Path, measured: Callable[[str], None]) -> None:
    """Kill before each of the first calls that make data durable, and at random times."""
    rng, calls = np.random.default_rng(runs.seed), []
    tokens = write_tokens(tmp_path)
    path = write_run(
        tmp_path, tokens, "killed", checkpoint={"asynchronous": True, "interval": 1, "keep_last": 2}
    )
    for number in range(1, 41):
        calls += [(killed_at_call, (path, number)), (intact_steps, (tmp_path / "killed",))]
        if number % 10 == 0:
            calls += [(os.system, (f"rm -r {tmp_path}/killed",))]
    for _ in range(20):
        calls += [
            (killed_in_time, (path, float(rng.uniform(0.0, 0.4)))),
            (intact_steps, (tmp_path / "killed",)),
        ]
    ended = run_ranks(in_forks, 1, [*calls, (main, (path,))], timeout=1700)[0]
    assert all(
        result.value is not None
        for result, (call, _) in zip(ended, calls, strict=False)
        if call is intact_steps
    )
    assert ended[-1].value == 0, runs.seed
    assert state_digests(tmp_path / "killed", STEPS) == state_digests(
        runs.folder / "whole", STEPS
    ), runs.seed
    measured(
        f"{sum(result.signal == signal.SIGKILL for result in ended)} kills, 0 lost, end "
        "bit-identical"
    )
