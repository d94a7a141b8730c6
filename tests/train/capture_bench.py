"""Configure the runs of the capture tests, and list the calls that they make."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_kd.config import RunConfig, dump_toml
from tests.helpers.tiny import tiny, write_tokens
from tests.train.capture_ranks import (
    captured_calls,
    poisoned_steps,
    recomputed_targets,
    run_killed,
    run_program,
    run_with_full_disk,
    shards_in,
)

STEPS, CHECKPOINTED = 6, 9
FILE_LIMIT = 16_000
# One long shard; no other file grows.
FULL: dict[str, Any] = {
    "capture": {"shard_samples": 400},
    "train": {"steps": 60},
    "telemetry": {"log_interval": 60},
}
# During a step with a finished shard before it; between captured targets and their checkpoint;
# between the checkpoint and the publication.
KILLS = [("stepped", 2), ("staged", 2), ("saved", 5), ("stepped", 8)]
SAVED: dict[str, Any] = {
    "capture": {"shard_samples": 8},
    "train": {"steps": CHECKPOINTED},
    "checkpoint": {"interval": 3, "keep_last": 9},
}

Call = tuple[Callable[..., Any], tuple[Any, ...]]


class Bench:
    """Hold a folder with data, and make the configs of runs that begin alike."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data, self.valid = write_tokens(folder), write_tokens(folder, tokens=1500, seed=1)

    def config(
        self, name: str, *, capture: dict[str, Any] | None = None, **overrides: Any
    ) -> RunConfig:
        """Return a run's config.

        Args:
            name: of the run directory and of its cache.
            capture: further keys of the section; None: no capture. One step per shard, fp32.
            overrides: keys of other sections.
        """
        settings: dict[str, Any] = {
            "train": {"steps": STEPS, "evaluate_batches": 1},
            "distill": {"top_k": 12, "top_p": 0.95},
            "data": {"valid": {"held_out": self.valid}},
        }
        if capture is not None:
            settings["capture"] = {
                "directory": str(self.cache(name)),
                "value_encoding": "fp32",
                "shard_samples": 1,
                **capture,
            }
        for section, keys in overrides.items():
            settings[section] = {**settings.get(section, {}), **keys}
        return tiny(self.folder / name, self.data, **settings)

    def cache(self, name: str) -> Path:
        return self.folder / f"{name}_cache"

    def write(self, name: str, **overrides: Any) -> Path:
        path = self.folder / f"{name}.toml"
        path.write_text(dump_toml(self.config(name, **overrides)))
        return path


def single_rank_calls(bench: Bench) -> dict[str, Call]:
    """Return all calls that need one rank, by name."""
    calls = comparison_calls(bench) | interruption_calls(bench) | recomputation_calls(bench)
    # With its teacher's learning rate the student would make the same steps.
    student = {
        "teacher": {"source": "cached", "cache": str(bench.cache("stepwise"))},
        "distill": {"alpha": 0.5, "tail": "bucket"},
        "optimizer": {"learning_rate": 1e-4},
    }
    calls["student"] = run_program, (bench.write("student", **student),)
    poisoned = bench.config("poisoned", capture={}, train={"nonfinite": "skip"})
    calls["poisoned"] = poisoned_steps, (poisoned, 2)
    calls["full"] = run_with_full_disk, (bench.write("full", **FULL), FILE_LIMIT)
    calls |= {
        name: (run_program, (bench.folder / "whole.toml", *overrides))
        for name, (overrides, _) in refusals(bench).items()
    }
    calls |= {
        f"documented{number}": (run_program, tuple(words))
        for number, words in enumerate(documented_commands(bench))
    }
    return calls


def comparison_calls(bench: Bench) -> dict[str, Call]:
    """Return pairs of runs without and with capture."""
    recomputed = {
        "model": {"recompute": "full"},
        "distill": {"head_schedule": "recompute", "chunk_tokens": 20},
    }
    # With dropout: one random number more or less would change the run.
    sampled = {
        "distill": {"num_draws": 20, "top_k": 64, "top_p": 1.0},
        "model": {"hidden_dropout": 0.1},
    }
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "recomputed": recomputed,
        "sampled": sampled,
    }
    calls: dict[str, Call] = {}
    for name, settings in variants.items():
        jobs = [
            (bench.config(f"{name}{capture is None}", capture=capture, **settings), STEPS, True)
            for capture in (None, {})
        ]
        calls[name] = captured_calls, (jobs,)
    return calls


def interruption_calls(bench: Bench) -> dict[str, Call]:
    """Return an uninterrupted run, and one that is killed and continued again and again."""
    calls: dict[str, Call] = {"whole": (run_program, (bench.write("whole", **SAVED),))}
    broken = bench.write("broken", **SAVED)
    for number, (position, step) in enumerate(KILLS):
        calls[f"killed{number}"] = run_killed, (broken, position, step)
        calls[f"shards{number}"] = shards_in, (bench.cache("broken"),)
    calls["broken"] = run_program, (broken,)
    overrides = ["--capture.directory", str(bench.cache("again")), "--checkpoint.resume", "true"]
    calls["again"] = run_program, (broken, *overrides)
    return calls


def recomputation_calls(bench: Bench) -> dict[str, Call]:
    """Return a run with a checkpoint per step, and the targets that its checkpoints give."""
    settings: dict[str, Any] = {"capture": {}, "checkpoint": {"interval": 1, "keep_last": 9}}
    calls: dict[str, Call] = {"stepwise": (run_program, (bench.write("stepwise", **settings),))}
    config = bench.config("stepwise", **settings)
    for step in range(1, STEPS):
        checkpoint = bench.folder / f"stepwise/checkpoints/step-{step:08d}"
        calls[f"recomputed{step}"] = recomputed_targets, (config, checkpoint, step)
    return calls


def refusals(bench: Bench) -> dict[str, tuple[list[str], str]]:
    """Return by name: overrides of a finished run's file, and a part of the error message."""
    fresh = ["--run.directory", str(bench.folder / "fresh")]
    changed = ["--train.seed", "8", "--checkpoint.allow_changes", "true"]
    dense = ["--distill.dense", "true", "--distill.top_k", "64", "--distill.top_p", "1.0"]
    room = ["--capture.directory", str(bench.folder / "room"), "--train.steps", "1000000000"]
    huge = ["--capture.shard_samples", "1000000000000"]
    return {
        "other run": (
            changed,
            "holds the targets of another training run (train.seed: was 7, is now 8)",
        ),
        "other k": (
            ["--distill.top_k", "9"],
            "selection: the cache has 'TopSelection(top_k=12",
        ),
        "second": (
            fresh,
            "already holds targets of training steps up to 8, but training goes on at step 0",
        ),
        "a file": (
            [*fresh, "--capture.directory", f"{bench.data}.bin"],
            "capture.directory cannot be written",
        ),
        "late": (
            [*fresh, "--capture.first_step", "9"],
            "capture.first_step (9) must be less than train.steps (9)",
        ),
        "dense": ([*fresh, *dense], "unset distill.dense"),
        "room": (
            [*fresh, *room, *huge],
            "MiB free, but a shard of each data-parallel rank may need",
        ),
    }


def documented_commands(bench: Bench) -> list[list[str]]:
    """Return the documented commands of a capturing teacher and of its student.

    Each is a run file and overrides, as the program's arguments.
    """
    settings = {"distill": {"top_k": 64, "top_p": 1.0}}
    files = {
        f"{name}.toml": bench.write(f"documented_{name}", **settings) for name in ("teacher", "run")
    }
    page = (Path(__file__).parents[2] / "docs/teachers.md").read_text(encoding="utf-8")
    lines = [
        line
        for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
        for line in block.splitlines()
    ]
    (capture,) = [line for line in lines if "--capture" in line]
    (student,) = [line for line in lines if "--teacher.source cached" in line]
    paths = {
        "cache/": str(bench.cache("documented")),
        "runs/second": str(bench.folder / "documented_run"),
    }
    commands = []
    for line in (capture, student):
        command, words = line.split(" --config ")
        assert command == "torchrun --nproc-per-node 8 -m megatron_kd.pretrain"
        run_file, *overrides = shlex.split(words)
        arguments = [paths.get(word, word) for word in overrides]
        commands.append([str(files[run_file]), *arguments])
    return commands
