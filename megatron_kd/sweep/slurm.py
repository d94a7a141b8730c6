"""A sweep on Slurm: an array of jobs for each level, the next one after the last; every task does one task of the sweep."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_kd.config import ConfigError
from megatron_kd.storage.atomic_files import write_atomically
from megatron_kd.sweep.grid import Sweep, Task
from megatron_kd.sweep.task_state import State, look

_CPUS_PER_RANK = 4

# The shell stays to see how the task ends. Values are words of an array: nothing is built by pasting strings.
_SCRIPT = """#!/usr/bin/env bash
# {comment}
set -euo pipefail
command=({words})
"${{command[@]}}" --task "$SLURM_ARRAY_TASK_ID" &
pid=$!
trap 'kill -USR1 "$pid" 2>/dev/null || true' USR1 TERM
# A signal to this shell ends a wait, not the task.
while true; do
    code=0
    wait "$pid" || code=$?
    kill -0 "$pid" 2>/dev/null || break
done
if [[ $code -eq 85 ]]; then
    name="${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
    # A job that was cancelled, or that Slurm requeues by itself, is no longer running: it is not brought back.
    state="$(squeue --noheader --format=%T --jobs="$name" || true)"
    if [[ $state == RUNNING ]]; then
        scontrol requeue "$name" && sleep 60
    fi
fi
exit "$code"
"""


@dataclass(frozen=True)
class Submission:
    """One array: its script's text, where it is written, and the options of sbatch without the dependency."""

    path: Path
    script: str
    options: tuple[str, ...]


def submissions(
    sweep: Sweep, tasks: Mapping[str, Task], words: Sequence[str], arguments: Sequence[str]
) -> list[Submission]:
    """An array for each level of `tasks` that has something left to do.

    words: the command that each task starts, without --task. arguments: more options of sbatch; they win over the ones set here.
    ConfigError for a newline or another control character in any of them.
    """
    for word in (*words, *arguments):
        if not word.isprintable():
            raise ConfigError(
                f"a word of the jobs has a newline or another control character: {word!r}"
            )
    found, numbers = look(sweep, tasks), {name: number for number, name in enumerate(sweep.tasks)}
    made = []
    for level, members in enumerate(sweep.levels()):
        chosen = [
            task
            for task in members
            if task.name in tasks and found[task.name].state is not State.DONE
        ]
        if not chosen:
            continue
        name = f"level-{level}"
        comment = (
            f"Level {level} of a sweep: {len(chosen)} tasks. Written by tools/sweep.py --slurm."
        )
        script = _SCRIPT.format(comment=comment, words=" ".join(map(shlex.quote, words)))
        options = _options(sweep, name, chosen, [numbers[task.name] for task in chosen], arguments)
        made.append(Submission(sweep.out / "slurm" / f"{name}.sbatch", script, options))
    return made


def _options(
    sweep: Sweep,
    name: str,
    chosen: Sequence[Task],
    numbers: Sequence[int],
    arguments: Sequence[str],
) -> tuple[str, ...]:
    ranks = max(task.ranks for task in chosen)
    every = [
        step.config
        for task in sweep.tasks.values()
        for step in task.steps
        if step.config is not None
    ]
    gpus = (
        []
        if all(config.train.device == "cpu" for config in every)
        else [f"--gpus-per-node={ranks}"]
    )
    # --chdir, because a folder with % in its name would mean something in --output.
    return (
        f"--job-name=kd-sweep-{name}",
        f"--array={ranges(numbers)}",
        "--nodes=1",
        "--ntasks=1",
        f"--cpus-per-task={_CPUS_PER_RANK * ranks}",
        *gpus,
        "--signal=B:USR1@300",
        "--requeue",
        "--open-mode=append",
        f"--chdir={sweep.out / 'slurm'}",
        f"--output={name}-%A_%a.log",
        *arguments,
    )


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as sbatch wants them: 0-3,7."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def submit(made: Sequence[Submission], *, dry_run: bool) -> list[str]:
    """Write the scripts and submit them, each after the one before; their numbers. A dry run prints scripts and commands instead."""
    jobs: list[str] = []
    for each in made:
        after = [f"--dependency=afterok:{jobs[-1]}", "--kill-on-invalid-dep=yes"] if jobs else []
        command = ["sbatch", "--parsable", *after, *each.options, str(each.path)]
        if dry_run:
            print(f"# {each.path}\n{each.script}{shlex.join(command)}\n")
            jobs.append(f"JOB{len(jobs)}")
            continue
        each.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(each.path, each.script.encode())
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise ConfigError(
                "sbatch is not found: start this where jobs are submitted, or look at what it would do with --dry-run"
            ) from None
        if done.returncode:
            raise ConfigError(
                f"sbatch refused {each.path} (submitted before it: {', '.join(jobs) or 'nothing'}): {done.stderr.strip()}"
            )
        jobs.append(done.stdout.strip().partition(";")[0])  # a cluster's name can follow
        print(f"{each.path.stem} {jobs[-1]}", file=sys.stdout, flush=True)
    return jobs
