"""Run the programs whose checkpoints the tests of faults look at."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kd.checkpoint.store import step_folder
from megatron_kd.config import dump_toml
from tests.checkpoint.fault_runs import (
    flip,
    full_disk,
    intact_steps,
    killed_after,
    killed_at_call,
    killed_in_time,
    locked_by_another,
    main,
    no_op,
    poison,
    slow_disk,
    small_free_space,
    terminate_at_5,
)
from tests.helpers.forks import Ended, in_forks
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny, write_tokens
from tests.losses.cases import fresh_seed

Calls = dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]
ASYNCHRONOUS = {"asynchronous": True}
STEPS = 12
PAYLOADS = {
    ".metadata": "which no checkpoint needs",
    "path": "is not one of a checkpoint's",
    "common.pt": "cannot be loaded",
    "tensors": "cannot be loaded",
}


@dataclass
class Runs:
    """Hold the results of the calls.

    Attributes:
        folder: of all runs.
        ended: results by name.
        seed: of the random kills.
    """

    folder: Path
    ended: dict[str, Ended]
    seed: int

    def codes(self, *names: str) -> list[Any]:
        """Return what the programs returned, or the signals that ended them."""
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


def kill_calls(folder: Path, tokens: str, rng: np.random.Generator) -> Calls:
    """Return runs that are killed at random moments, and checks of their checkpoints."""
    calls: Calls = {}
    killed = write_run(
        folder, tokens, "killed", checkpoint={**ASYNCHRONOUS, "interval": 1, "keep_last": 2}
    )
    for number in range(4):
        calls[f"call{number}"] = killed_at_call, (killed, int(rng.integers(10, 90)))
        calls[f"look{2 * number}"] = intact_steps, (folder / "killed",)
        calls[f"time{number}"] = killed_in_time, (killed, float(rng.uniform(0.01, 0.5)))
        calls[f"look{2 * number + 1}"] = intact_steps, (folder / "killed",)
    calls["leftover"] = os.makedirs, (folder / "killed/checkpoints/.incomplete-step-00000099",)
    calls["killed"] = main, (killed,)
    return calls


def damage_calls(folder: Path, tokens: str) -> Calls:
    """Return a run that resumes after its checkpoints were damaged."""
    calls: Calls = {}
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
    return calls


def disk_calls(folder: Path, tokens: str) -> Calls:
    """Return runs on a disk without room."""
    calls: Calls = {}
    full = write_run(folder, tokens, "full")
    calls["half"] = killed_after, (full, 6)
    calls["full"] = full_disk, (full, 200_000)
    calls["full later"] = full_disk, (full, 200_000, "--checkpoint.asynchronous", "true")
    for name, times in (("no room", 0.9), ("tight", 1.9)):
        run = write_run(folder, tokens, name, train={"steps": 6})
        calls[name] = small_free_space, (run, step_folder(folder / "whole/checkpoints", 2), times)
    return calls


def slow_calls(folder: Path, tokens: str) -> Calls:
    """Return runs on a slow disk."""
    calls: Calls = {}
    slow = write_run(folder, tokens, "slow")
    calls["slow"] = slow_disk, (slow, 1.0, no_op, "--checkpoint.timeout_seconds", "0.2")
    calls["leave"] = (
        slow_disk,
        (write_run(folder, tokens, "leave", checkpoint=ASYNCHRONOUS), 1.0, terminate_at_5),
    )
    hot = {"learning_rate": 1e30, "min_learning_rate": 1e30, "clip_grad": 0.0, "warmup_steps": 0}
    calls["nan"] = (
        slow_disk,
        (
            write_run(
                folder, tokens, "nan", optimizer=hot, checkpoint={**ASYNCHRONOUS, "interval": 1}
            ),
            0.5,
            no_op,
        ),
    )
    return calls


def directory_calls(folder: Path, tokens: str) -> Calls:
    """Return runs whose directory is blocked or locked."""
    calls: Calls = {}
    blocked = write_run(folder, tokens, "blocked")
    (folder / "blocked").mkdir()
    (folder / "blocked/checkpoints").touch()
    calls["blocked"] = main, (blocked,)
    calls["held"] = (
        locked_by_another,
        (write_run(folder, tokens, "held", train={"steps": 2}), folder / "held"),
    )
    return calls


def payload_calls(folder: Path, tokens: str) -> Calls:
    """Return runs whose checkpoint contains code."""
    calls: Calls = {}
    for name in PAYLOADS:
        run = write_run(folder, tokens, f"payload{name}", train={"steps": 4})
        calls[f"before {name}"] = killed_after, (run, 2)
        calls[f"poison {name}"] = (
            poison,
            (step_folder(folder / f"payload{name}/checkpoints", 2), name, folder),
        )
        calls[f"payload {name}"] = main, (run,)
    return calls


def run_all(folder: Path) -> Runs:
    """Run every program in a fork of one process."""
    seed = fresh_seed()
    rng, tokens = np.random.default_rng(seed), write_tokens(folder)
    later = write_run(folder, tokens, "later", checkpoint=ASYNCHRONOUS)
    calls: Calls = {
        "whole": (main, (write_run(folder, tokens, "whole"),)),
        "later": (main, (later,)),
        **kill_calls(folder, tokens, rng),
        **damage_calls(folder, tokens),
        **disk_calls(folder, tokens),
        **slow_calls(folder, tokens),
        **directory_calls(folder, tokens),
        **payload_calls(folder, tokens),
    }
    ended = run_ranks(in_forks, 1, list(calls.values()), timeout=380)[0]
    return Runs(folder, dict(zip(calls, ended, strict=True)), seed)
