"""Run a grid of experiments: jobs once, then every cell with every seed and its measurements.

    python tools/sweep.py grid.toml --output out [--small] [--set name=value ...] [--jobs 2]
        [--only "alpha*" ...]
    python tools/sweep.py grid.toml --output out --list       # every task and its state
    python tools/sweep.py grid.toml --output out --dry-run    # every command
    python tools/sweep.py grid.toml --output out --slurm --ranks 4
        --sbatch-args --partition=gpu --time=8:00:00
    python tools/report.py out --html out/report.html

examples/README.md describes the keys of a sweep file. Each task prints into a log in its folder.
On SIGINT and SIGTERM runs save and exit, and the same command resumes them. Tasks that are done are
not repeated. If the definition of a task that was begun or done changes, the sweep is refused:
choose another --output, or name the task with --redo, which moves the old folder aside.

Exit codes: 0 all done, 1 something failed (listed at the end), 2 bad input, 85 stopped on request
and resumable, 93 (--task) not to be started again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_kd.config import ConfigError
from megatron_kd.storage.directory_lock import DirectoryLock, DirectoryLockedError
from megatron_kd.storage.exit_codes import BAD_INPUT, DO_NOT_RESTART, FAILED, FINISHED, REQUEUE
from megatron_kd.sweep.definition.grid import resolve
from megatron_kd.sweep.definition.tasks import Sweep, Task, select, with_needs
from megatron_kd.sweep.execution.local_runner import FAILURES, run_tasks
from megatron_kd.sweep.execution.slurm import job_arrays, print_arrays, submit
from megatron_kd.sweep.execution.sweep_record import provenance, write_sweep
from megatron_kd.sweep.execution.task_runner import (
    TaskOutcome,
    TaskRunner,
    print_line,
)
from megatron_kd.sweep.execution.task_state import (
    TaskState,
    read_statuses,
    redo,
    refuse_changed,
)
from megatron_kd.sweep.file_names import SWEEP_FILE

# Seconds that a task waits for the files of its needs: network file systems may show them late.
_FILE_DELAY = 70.0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options and run, show or submit the sweep."""
    options = _parser().parse_args(argv)
    try:
        for name, least in (("jobs", 1), ("ranks", 1), ("retries", 0)):
            if getattr(options, name) < least:
                raise ConfigError(f"--{name} must be at least {least}")
        sweep = resolve(
            options.file,
            options.output,
            small=options.small,
            settings=options.set,
            ranks=options.ranks,
        )
        if options.task is not None:
            return _run_one(sweep, options)
        if options.list or (options.dry_run and not options.slurm):
            return _show(sweep, options)
        return _run_all(sweep, options)
    except ConfigError as error:
        print(f"sweep: error: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_definition_options(parser)
    _add_execution_options(parser)
    _add_action_options(parser)
    return parser


def _add_definition_options(parser: argparse.ArgumentParser) -> None:
    """Add what the sweep consists of."""
    parser.add_argument("file", type=Path, help="sweep file (TOML)")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of everything that the sweep writes"
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help="use the values of [small], to see that everything works",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="replace a value of [variables]; may be repeated",
    )


def _add_execution_options(parser: argparse.ArgumentParser) -> None:
    """Add which tasks run and how."""
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="number of tasks at a time, which share the cores (1)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="GLOB",
        help="run only cells and jobs with these names, and what they need",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        help="processes of each run whose job or cell sets no number (1)",
    )
    parser.add_argument(
        "--retries",
        type=int,
        default=1,
        help="how often something that failed is started again (1)",
    )
    parser.add_argument(
        "--redo",
        nargs="+",
        default=[],
        metavar="GLOB",
        help="move these and what was made from them aside, and do them again",
    )


def _add_action_options(parser: argparse.ArgumentParser) -> None:
    """Add what to do instead of running the sweep here; --sbatch-args must be the last option."""
    parser.add_argument(
        "--list", action="store_true", help="print every task and its state, and exit"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print every command, and exit; with --slurm, the scripts",
    )
    parser.add_argument(
        "--slurm",
        action="store_true",
        help="submit an array of jobs for each level instead of running here",
    )
    parser.add_argument(
        "--task",
        type=int,
        metavar="I",
        help="do only this task; the jobs of --slurm use it",
    )
    parser.add_argument(
        "--sbatch-args",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="OPTION",
        help="further options of sbatch; must come last",
    )


def _show(sweep: Sweep, options: argparse.Namespace) -> int:
    """Print the state or the commands of the selected tasks."""
    statuses, selected = read_statuses(sweep), select(sweep, options.only)
    for number, (name, task) in enumerate(sweep.tasks.items()):
        if name not in selected:
            continue
        state = statuses[name].state
        if options.list:
            needs = f"  needs {', '.join(task.needs)}" if task.needs else ""
            print(f"{number:4d}  {state.value:8s}{name}  {task.folder}{needs}")
        elif state is not TaskState.DONE:
            print(f"# {name}\n" + "\n".join(shlex.join(step.argv) for step in task.steps))
    return FINISHED


def _run_all(sweep: Sweep, options: argparse.Namespace) -> int:
    """Run or submit the selected tasks, as the only sweep in the folder."""
    tasks, origin = select(sweep, options.only), provenance()
    if options.slurm and options.dry_run:
        refuse_changed(sweep, tasks)
        print_arrays(job_arrays(sweep, tasks, _task_command(options), options.sbatch_args))
        return FINISHED
    lock = _lock(sweep.out)
    try:
        if options.redo:
            for name in redo(sweep, options.redo):
                print_line(f"put aside: {name}")
        refuse_changed(sweep, tasks)
        write_sweep(sweep, origin)
        if options.slurm:
            submit(job_arrays(sweep, tasks, _task_command(options), options.sbatch_args))
            return FINISHED
        runner = _task_runner(sweep, options, origin)
        return _report(run_tasks(sweep, tasks, runner, workers=options.jobs))
    finally:
        lock.release()


def _run_one(sweep: Sweep, options: argparse.Namespace) -> int:
    """Run a task by its number, of the sweep as it was submitted."""
    if not 0 <= options.task < len(sweep.tasks):
        raise ConfigError(f"--task ({options.task}) must be in 0 .. {len(sweep.tasks) - 1}")
    _check_submitted(sweep, options)
    name = list(sweep.tasks)[options.task]
    tasks = with_needs(sweep.tasks, [name])
    missing = _wait_for_needs(sweep, {need: tasks[need] for need in tasks if need != name})
    if missing:
        print(
            f"sweep: error: {name!r} needs {missing!r}, which is not done",
            file=sys.stderr,
            flush=True,
        )
        return FAILED
    refuse_changed(sweep, tasks)
    outcomes = run_tasks(sweep, tasks, _task_runner(sweep, options, provenance()), workers=1)
    if any(outcome.result == "stopped" for outcome in outcomes.values()):
        return DO_NOT_RESTART
    return _report(outcomes)


def _check_submitted(sweep: Sweep, options: argparse.Namespace) -> None:
    path = sweep.out / SWEEP_FILE
    try:
        submitted = json.loads(path.read_text(encoding="utf-8"))["digest"]
    except (OSError, ValueError, KeyError):
        raise ConfigError(
            f"{path} cannot be read: --task is for a sweep that was started or submitted"
        ) from None
    if submitted != sweep.digest():
        raise ConfigError(
            f"{options.file}, or a run file of it, has changed since this sweep was submitted: "
            "submit it again"
        )


def _wait_for_needs(sweep: Sweep, needs: Mapping[str, Task]) -> str:
    """Wait until all needs are done; return the name of one that does not become so, or ""."""
    deadline = time.monotonic() + _FILE_DELAY
    while True:
        missing = [
            name
            for name, status in read_statuses(sweep, needs).items()
            if status.state is not TaskState.DONE
        ]
        if not missing:
            return ""
        if time.monotonic() > deadline:
            return missing[0]
        time.sleep(1.0)


def _task_runner(
    sweep: Sweep, options: argparse.Namespace, origin: Mapping[str, str]
) -> TaskRunner:
    cores = len(os.sched_getaffinity(0))
    return TaskRunner(
        sweep.out,
        threads=max(1, cores // options.jobs),
        retries=options.retries,
        provenance=origin,
    )


def _task_command(options: argparse.Namespace) -> list[str]:
    """Return the command of a Slurm task without --task."""
    return [
        sys.executable,
        str(Path(__file__).resolve()),
        str(options.file.resolve()),
        "--output",
        str(options.output.resolve()),
        "--ranks",
        str(options.ranks),
        "--retries",
        str(options.retries),
        *(["--small"] if options.small else []),
        *(word for setting in options.set for word in ("--set", setting)),
    ]


def _report(outcomes: Mapping[str, TaskOutcome]) -> int:
    """Print a line for everything that is not done; return the exit code."""
    failed = {name: outcome for name, outcome in outcomes.items() if outcome.result in FAILURES}
    for name, outcome in failed.items():
        print_line(f"{outcome.result}: {name}: {outcome.message}")
    interrupted = sum(outcome.result == "interrupted" for outcome in outcomes.values())
    if interrupted:
        print_line(f"{interrupted} left to do: start it again to go on")
        return REQUEUE
    print_line(f"{len(failed)} not done" if failed else "all done")
    return FAILED if failed else FINISHED


def _lock(directory: Path) -> DirectoryLock:
    """Lock the folder of the sweep; ConfigError if another process works in it."""
    try:
        return DirectoryLock(directory)
    except DirectoryLockedError as error:
        if error.owner is None:
            raise
        raise ConfigError(
            f"--output {directory} is held by {error.owner} (last sign of life {error.age:.0f} s "
            "ago): two sweeps in one folder would start the same runs; wait for it, stop it, or "
            "choose another --output"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
