"""Submit a sweep to Slurm: one job array for each level of tasks, each after the one before."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_kd.config import ConfigError
from megatron_kd.storage.atomic_files import write_atomically
from megatron_kd.sweep.definition.tasks import Sweep, Task
from megatron_kd.sweep.execution.task_state import TaskState, read_statuses

_CPUS_PER_RANK = 4

# The shell stays to see how the task ends. Values are words of a bash array, quoted one by one.
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
    # Do not requeue a job that was cancelled or that Slurm requeues: it is not running any more.
    state="$(squeue --noheader --format=%T --jobs="$name" || true)"
    if [[ $state == RUNNING ]]; then
        scontrol requeue "$name" && sleep 60
    fi
fi
exit "$code"
"""


@dataclass(frozen=True)
class JobArray:
    """Hold one job array.

    Attributes:
        path: File that the script is written to.
        script: Text of the script.
        options: Options of sbatch without the dependency.
    """

    path: Path
    script: str
    options: tuple[str, ...]


def job_arrays(
    sweep: Sweep, tasks: Mapping[str, Task], command: Sequence[str], sbatch_options: Sequence[str]
) -> list[JobArray]:
    """Return a job array for each level of tasks that are not all done.

    Args:
        sweep: The sweep.
        tasks: Tasks to run.
        command: Words that start one task, without --task.
        sbatch_options: More options of sbatch. They win over the ones that are set here.

    Returns:
        The arrays, in the order of the levels.

    Raises:
        ConfigError: A word has a newline or another control character.
    """
    for word in (*command, *sbatch_options):
        if not word.isprintable():
            raise ConfigError(
                f"a word of the jobs has a newline or another control character: {word!r}"
            )
    statuses = read_statuses(sweep, tasks)
    numbers = {name: number for number, name in enumerate(sweep.tasks)}
    arrays = []
    for level, members in enumerate(sweep.levels()):
        pending = [
            task
            for task in members
            if task.name in tasks and statuses[task.name].state is not TaskState.DONE
        ]
        if not pending:
            continue
        name = f"level-{level}"
        script = _SCRIPT.format(
            comment=f"Level {level} of a sweep: {len(pending)} tasks. "
            "Written by tools/sweep.py --slurm.",
            words=" ".join(map(shlex.quote, command)),
        )
        indices = ranges([numbers[task.name] for task in pending])
        options = _options(sweep, name, pending, indices)
        path = sweep.out / "slurm" / f"{name}.sbatch"
        arrays.append(JobArray(path, script, (*options, *sbatch_options)))
    return arrays


def _options(sweep: Sweep, name: str, tasks: Sequence[Task], indices: str) -> list[str]:
    ranks = max(task.ranks for task in tasks)
    configs = [
        step.config
        for task in sweep.tasks.values()
        for step in task.steps
        if step.config is not None
    ]
    on_cpus = all(config.train.device == "cpu" for config in configs)
    return [
        f"--job-name=kd-sweep-{name}",
        f"--array={indices}",
        "--nodes=1",
        "--ntasks=1",
        f"--cpus-per-task={_CPUS_PER_RANK * ranks}",
        *([] if on_cpus else [f"--gpus-per-node={ranks}"]),
        "--signal=B:USR1@300",
        "--requeue",
        "--open-mode=append",
        # sbatch would expand a % of the folder's name in --output.
        f"--chdir={sweep.out / 'slurm'}",
        f"--output={name}-%A_%a.log",
    ]


def ranges(numbers: Sequence[int]) -> str:
    """Format numbers as the --array option of sbatch expects them, such as 0-3,7."""
    bounds: list[list[int]] = []
    for number in sorted(numbers):
        if bounds and number == bounds[-1][1] + 1:
            bounds[-1][1] = number
        else:
            bounds.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in bounds)


def submit(arrays: Sequence[JobArray]) -> list[str]:
    """Write the scripts and submit them, each after the one before.

    Returns:
        The job numbers.

    Raises:
        ConfigError: There is no sbatch, or it refuses an array.
    """
    jobs: list[str] = []
    for array in arrays:
        array.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(array.path, array.script.encode())
        try:
            process = subprocess.run(
                _sbatch(array, jobs), capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            raise ConfigError(
                "sbatch is not found: start this where jobs are submitted, "
                "or look at what it would do with --dry-run"
            ) from None
        if process.returncode:
            raise ConfigError(
                f"sbatch refused {array.path} (submitted before it: "
                f"{', '.join(jobs) or 'nothing'}): {process.stderr.strip()}"
            )
        # The name of a cluster may follow the number.
        jobs.append(process.stdout.strip().partition(";")[0])
        print(f"{array.path.stem} {jobs[-1]}", file=sys.stdout, flush=True)
    return jobs


def print_arrays(arrays: Sequence[JobArray]) -> None:
    """Print the scripts and the commands that `submit` would use."""
    for number, array in enumerate(arrays):
        command = _sbatch(array, [f"JOB{number - 1}"] if number else [])
        print(f"# {array.path}\n{array.script}{shlex.join(command)}\n")


def _sbatch(array: JobArray, jobs: Sequence[str]) -> list[str]:
    """Return the command that submits an array after the last of `jobs`."""
    dependency = [f"--dependency=afterok:{jobs[-1]}", "--kill-on-invalid-dep=yes"] if jobs else []
    return ["sbatch", "--parsable", *dependency, *array.options, str(array.path)]
