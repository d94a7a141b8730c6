"""What can befall a run's checkpoints: kills at every phase, full and slow disks, damage, payloads, a second run, a request to leave."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_kd.checkpoint.store import complete_steps, step_folder
from megatron_kd.config import dump_toml
from tests.checkpoint.fault_runs import (
    events,
    flip,
    full_disk,
    held_by_another,
    killed_after,
    killed_at_call,
    killed_in_time,
    main,
    nothing,
    poison,
    slow_disk,
    small_disk,
    small_room,
    sound_steps,
    state_of,
    terminate_at_5,
)
from tests.helpers.forks import Ended, in_forks
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny, write_tokens
from tests.losses.cases import fresh_seed

pytestmark = [pytest.mark.dist, pytest.mark.timeout(400)]

STEPS = 12
PAYLOADS = {
    ".metadata": "which no checkpoint needs",
    "path": "is not one of a checkpoint's",
    "common.pt": "cannot be loaded",
    "tensors": "cannot be loaded",
}


@dataclass
class Runs:
    """What the calls gave, by name; the folder of all runs."""

    folder: Path
    ended: dict[str, Ended]
    seed: int

    def codes(self, *names: str) -> list[Any]:
        """What the programs returned, or the signals that ended them."""
        return [-self.ended[name].signal or self.ended[name].value for name in names]


def write_run(folder: Path, tokens: str, name: str, **overrides: Any) -> Path:
    shared: dict[str, Any] = {
        "train": {"steps": STEPS},
        "checkpoint": {"interval": 2, "keep_last": 9},
    }
    for section, keys in overrides.items():
        shared.setdefault(section, {}).update(keys)
    path = folder / f"{name}.toml"
    path.write_text(dump_toml(tiny(folder / name, tokens, **shared)))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every program here in a fork of one process."""
    folder, seed = tmp_path_factory.mktemp("faults"), fresh_seed()
    rng, tokens, calls = np.random.default_rng(seed), write_tokens(folder), {}
    later = {"asynchronous": True}
    calls["whole"] = main, (write_run(folder, tokens, "whole"),)
    calls["later"] = main, (write_run(folder, tokens, "later", checkpoint=later),)
    killed = write_run(
        folder, tokens, "killed", checkpoint={**later, "interval": 1, "keep_last": 2}
    )
    for number in range(4):
        calls[f"call{number}"] = killed_at_call, (killed, int(rng.integers(10, 90)))
        calls[f"look{2 * number}"] = sound_steps, (folder / "killed",)
        calls[f"time{number}"] = killed_in_time, (killed, float(rng.uniform(0.01, 0.5)))
        calls[f"look{2 * number + 1}"] = sound_steps, (folder / "killed",)
    calls["leftover"] = os.makedirs, (folder / "killed/checkpoints/.incomplete-step-00000099",)
    calls["killed"] = main, (killed,)
    damaged = write_run(folder, tokens, "damaged")
    steps = {
        step: step_folder(folder / "damaged/checkpoints", step) for step in range(2, STEPS + 1, 2)
    }
    calls["stop"] = killed_after, (damaged, 6)
    calls["flip6"] = flip, (steps[6] / "__0_0.distcp",)
    calls["flip4"] = flip, (steps[4] / "state.json",)
    calls["damaged"] = main, (damaged,)
    for step in range(2, STEPS + 1, 2):
        calls[f"flip all {step}"] = flip, (steps[step] / "common.pt",)
    calls["none good"] = main, (damaged,)
    full = write_run(folder, tokens, "full")
    calls["half"] = killed_after, (full, 6)
    calls["full"] = full_disk, (full, 200_000)
    calls["full later"] = full_disk, (full, 200_000, "--checkpoint.asynchronous", "true")
    for name, times in (("no room", 0.9), ("tight", 1.9)):
        run = write_run(folder, tokens, name, train={"steps": 6})
        calls[name] = small_room, (run, step_folder(folder / "whole/checkpoints", 2), times)
    slow = write_run(folder, tokens, "slow")
    calls["slow"] = slow_disk, (slow, 1.0, nothing, "--checkpoint.timeout_seconds", "0.2")
    calls["leave"] = (
        slow_disk,
        (write_run(folder, tokens, "leave", checkpoint=later), 1.0, terminate_at_5),
    )
    hot = {"learning_rate": 1e30, "min_learning_rate": 1e30, "clip_grad": 0.0, "warmup_steps": 0}
    calls["nan"] = (
        slow_disk,
        (
            write_run(folder, tokens, "nan", optimizer=hot, checkpoint={**later, "interval": 1}),
            0.5,
            nothing,
        ),
    )
    blocked = write_run(folder, tokens, "blocked")
    (folder / "blocked").mkdir()
    (folder / "blocked/checkpoints").touch()
    calls["blocked"] = main, (blocked,)
    calls["held"] = (
        held_by_another,
        (write_run(folder, tokens, "held", train={"steps": 2}), folder / "held"),
    )
    for name in PAYLOADS:
        run = write_run(folder, tokens, f"payload{name}", train={"steps": 4})
        calls[f"before {name}"] = killed_after, (run, 2)
        calls[f"poison {name}"] = (
            poison,
            (step_folder(folder / f"payload{name}/checkpoints", 2), name, folder),
        )
        calls[f"payload {name}"] = main, (run,)
    ended = run_ranks(in_forks, 1, list(calls.values()), timeout=380)[0]
    return Runs(folder, dict(zip(calls, ended, strict=True)), seed)


@pytest.mark.fault("S1", "S2")
def test_asynchronous_writes_the_same_files(runs: Runs) -> None:
    assert runs.codes("whole", "later") == [0, 0], runs.ended["later"].output
    for step in range(2, STEPS + 1, 2):
        assert state_of(runs.folder / "whole", step) == state_of(runs.folder / "later", step), step
    assert sound_steps(runs.folder / "later") == list(range(2, STEPS + 1, 2))
    rows = events(runs.folder / "later")
    assert {row["event"] for row in rows} == {"saved", "verified"}
    assert rows[-1]["event"] == "verified"
    assert rows[-1]["step"] == STEPS


@pytest.mark.fault(1, 2)
@pytest.mark.fault("S6")
def test_killed_at_any_moment(runs: Runs, measured: Callable[[str], None]) -> None:
    """Whatever can be seen is whole, what was complete stays, and the end is that of a run that nobody disturbed."""
    found = [runs.ended[f"look{number}"].value for number in range(8)]
    assert all(each is not None for each in found), [
        runs.ended[f"look{number}"].output for number in range(8)
    ]
    newest = [each[-1] if each else 0 for each in found]
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
        f"{signals.count(-signal.SIGKILL)} kills, newest complete step after each try {newest}, end bit-identical"
    )
    assert state_of(runs.folder / "killed", STEPS) == state_of(runs.folder / "whole", STEPS), (
        runs.seed
    )
    assert sorted(path.name for path in (runs.folder / "killed/checkpoints").iterdir()) == [
        "step-00000011",
        "step-00000012",
    ], runs.seed


@pytest.mark.fault(5)
def test_damaged_ones_are_passed_over(runs: Runs) -> None:
    output = runs.ended["damaged"].output
    assert runs.codes("damaged") == [0], output
    assert runs.codes("stop") == [-signal.SIGKILL], output
    assert "the checkpoint of step 6 is damaged and skipped" in output, output
    assert "__0_0.distcp has SHA-256" in output, output
    assert "the checkpoint of step 4 is damaged" in output
    assert "resuming from the checkpoint of step 2" in output
    assert state_of(runs.folder / "whole", STEPS).keys() == {"__0_0.distcp", "common.pt"}
    checkpoints = runs.folder / "damaged/checkpoints"
    names = {path.name for path in checkpoints.iterdir()}
    assert {"damaged-step-00000006", "damaged-step-00000004"} <= names
    # Replayed from step 2, they are those of the undisturbed run; the test has spoilt their common.pt since.
    data = "__0_0.distcp"
    assert (
        state_of(runs.folder / "damaged", STEPS)[data]
        == state_of(runs.folder / "whole", STEPS)[data]
    )


@pytest.mark.fault(5)
def test_none_is_good(runs: Runs) -> None:
    told = [
        line
        for line in runs.ended["none good"].output.splitlines()
        if "no checkpoint is intact" in line
    ]
    assert runs.codes("none good") == [2], runs.ended["none good"].output
    assert len(told) == 1, runs.ended["none good"].output
    assert all(f"step {step}: " in told[0] for step in range(2, STEPS + 1, 2))
    assert complete_steps(runs.folder / "damaged/checkpoints")


@pytest.mark.fault(6)
def test_full_disk(runs: Runs) -> None:
    for name in ("full", "full later"):
        output = runs.ended[name].output
        told = [line for line in output.splitlines() if line.startswith("megatron_kd: stopped:")]
        assert runs.codes(name) == [5], output
        assert len(told) == 1, output
        assert "Traceback" not in output, output
        assert "__0_0.distcp: File too large" in told[0], told
        assert "the checkpoint of step 6 is untouched" in told[0], told
    assert sound_steps(runs.folder / "full") == [2, 4, 6]
    assert not list((runs.folder / "full/checkpoints").glob(".*"))
    status = json.loads((runs.folder / "full/status.json").read_text())
    assert status["state"] == "stopped"
    assert "could not be written" in status["message"]


@pytest.mark.fault(6)
def test_room_for_no_further_checkpoint(runs: Runs) -> None:
    """Found before anything is written; a warning while there is room for one."""
    output = runs.ended["no room"].output
    assert runs.codes("no room", "tight") == [5, 0], output
    assert "GB are free: make room" in output, output
    assert "the checkpoint of step 2 is untouched" in output, output
    assert sound_steps(runs.folder / "no room") == [2]
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
def test_leaving_waits_for_the_save(runs: Runs) -> None:
    """Asked to leave while a save is on its way: that one and the last are complete, and there is nothing unfinished."""
    assert runs.codes("leave") == [85], runs.ended["leave"].output
    assert json.loads((runs.folder / "leave/status.json").read_text())["step"] == 5
    assert sound_steps(runs.folder / "leave") == [2, 4, 5]
    assert not list((runs.folder / "leave/checkpoints").glob(".*"))
    assert "could not be read back" not in runs.ended["leave"].output


def test_run_that_stops_keeps_what_is_on_its_way(runs: Runs) -> None:
    assert runs.codes("nan") == [93], runs.ended["nan"].output
    last = json.loads((runs.folder / "nan/status.json").read_text())["step"]
    assert sound_steps(runs.folder / "nan")[-1] == last - 1 > 0


@pytest.mark.fault(15)
def test_second_run_is_refused(runs: Runs) -> None:
    pid, while_held, afterwards = runs.ended["held"].value
    output = runs.ended["held"].output
    assert (while_held, afterwards) == (2, 0), output
    assert f"is held by process {pid} of " in output
    assert f"was locked by process {pid} of " in output
    assert "which is gone: going on" in output


@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.fault(12, 13)
def test_nothing_in_a_checkpoint_is_run(runs: Runs, name: str) -> None:
    assert runs.codes(f"before {name}", f"payload {name}") == [-signal.SIGKILL, 2], runs.ended[
        f"payload {name}"
    ].output
    assert runs.ended[f"poison {name}"].output == ""
    assert PAYLOADS[name] in runs.ended[f"payload {name}"].output
    assert not (runs.folder / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("later", ["false", "true"])
@pytest.mark.fault(6)
def test_disk_that_is_full(tmp_path: Path, later: str) -> None:
    """A real one, where rows of metrics.jsonl and status.json find no room either: seen in time, filled by others in between, and
    too small for the first checkpoint, whose size nobody knows before."""
    path = write_run(
        tmp_path,
        write_tokens(tmp_path),
        "full",
        checkpoint={"interval": 3},
        data={"index_cache": str(tmp_path / "index")},
    )
    seen, met = "GB are free: make room", "No space left on device"
    for kibibytes, deceived, steps, told in (
        (2500, False, [3, 6, 9], seen),
        (2500, True, [3, 6, 9], met),
        (740, False, [], met),
    ):
        arguments = path, kibibytes, deceived, tmp_path / "full", "--checkpoint.asynchronous", later
        (ended,) = run_ranks(in_forks, 1, [(small_disk, arguments)])[0]
        if ended.value is None:
            pytest.skip(f"no file system can be mounted here: {ended.output[-300:]}")
        assert ended.value == (5, steps), ended
        assert told in ended.output, ended
        assert "Traceback" not in ended.output


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.fault(1, 2)
def test_killed_at_every_phase(runs: Runs, tmp_path: Path, measured: Callable[[str], None]) -> None:
    """Before each of the first calls that make something durable or give it its name, and twenty times at random."""
    rng, calls = np.random.default_rng(runs.seed), []
    tokens = write_tokens(tmp_path)
    path = write_run(
        tmp_path, tokens, "killed", checkpoint={"asynchronous": True, "interval": 1, "keep_last": 2}
    )
    for number in range(1, 41):
        calls += [(killed_at_call, (path, number)), (sound_steps, (tmp_path / "killed",))]
        if number % 10 == 0:
            calls += [(os.system, (f"rm -r {tmp_path}/killed",))]
    for _ in range(20):
        calls += [
            (killed_in_time, (path, float(rng.uniform(0.0, 0.4)))),
            (sound_steps, (tmp_path / "killed",)),
        ]
    ended = run_ranks(in_forks, 1, [*calls, (main, (path,))], timeout=1700)[0]
    assert all(
        each.value is not None
        for each, (call, _) in zip(ended, calls, strict=False)
        if call is sound_steps
    )
    assert ended[-1].value == 0, runs.seed
    assert state_of(tmp_path / "killed", STEPS) == state_of(runs.folder / "whole", STEPS), runs.seed
    measured(
        f"{sum(each.signal == signal.SIGKILL for each in ended)} kills, 0 lost, end bit-identical"
    )
