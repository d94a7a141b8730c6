"""Run a grid of experiments: jobs once, then every cell with every seed, and what is measured on each. What is done is never done again.

    python tools/sweep.py grid.toml --output out [--small] [--set name=value ...] [--jobs 2] [--only "alpha*" ...]
    python tools/sweep.py grid.toml --output out --list          # every task and its state; --dry-run: every command
    python tools/sweep.py grid.toml --output out --slurm --ranks 4 --sbatch-args --partition=gpu --time=8:00:00
    python tools/report.py out --html out/report.html

The keys of a sweep file stand in examples/README.md. Each task prints into a log in its folder. SIGINT and SIGTERM let runs save and leave;
the same command goes on there. A change to what is done or begun already is refused: another --output, or --redo with a name, which puts
the old folder aside.

Exit codes: 0 all done, 1 something failed (listed at the end), 2 bad input, 85 asked to leave: start it again, 93 (--task) do not.
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
from megatron_kd.sweep.grid import Sweep, Task, resolve, select
from megatron_kd.sweep.local_runner import print_line, run_tasks
from megatron_kd.sweep.slurm import submissions, submit
from megatron_kd.sweep.sweep_record import SWEEP_FILE, provenance, write_sweep
from megatron_kd.sweep.task_runner import Outcome, Shop
from megatron_kd.sweep.task_state import State, look, redo, refuse_changed

# How long a task waits for what it needs: network file systems may show a new file a minute later.
_SEEN_WITHIN = 70.0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and do what was asked."""
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
            return _one(sweep, options)
        if options.list or (options.dry_run and not options.slurm):
            return _show(sweep, options)
        return _all(sweep, options)
    except ConfigError as error:
        print(f"sweep: error: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, help="sweep file (TOML)")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of everything that the sweep writes"
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help="with the values of [small], to see that everything works",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="replace a value of [variables]; may be repeated",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="tasks at a time; the cores are shared out among them (1)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="GLOB",
        help="only cells and jobs of these names, and what they need",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        help="processes of each run whose job or cell does not say (1)",
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
        help="put these aside, and what was made from them, and do them again",
    )
    parser.add_argument(
        "--list", action="store_true", help="print every task and its state, and leave"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print every command, and leave; with --slurm, the scripts",
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
        help="do this one task only (what the jobs of --slurm start)",
    )
    parser.add_argument(
        "--sbatch-args",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="OPTION",
        help="the last option: more for sbatch",
    )
    return parser


def _show(sweep: Sweep, options: argparse.Namespace) -> int:
    found, chosen = look(sweep), select(sweep, options.only)
    for number, (name, task) in enumerate(sweep.tasks.items()):
        if name not in chosen:
            continue
        if options.list:
            print(
                f"{number:4d}  {found[name].state.value:8s}{name}  {task.folder}{'  needs ' if task.needs else ''}{', '.join(task.needs)}"
            )
        elif found[name].state is not State.DONE:
            print(f"# {name}\n" + "\n".join(shlex.join(step.argv) for step in task.steps))
    return FINISHED


def _all(sweep: Sweep, options: argparse.Namespace) -> int:
    tasks, origin = select(sweep, options.only), provenance()
    if options.slurm and options.dry_run:
        refuse_changed(sweep, tasks)
        submit(submissions(sweep, tasks, _words(options), options.sbatch_args), dry_run=True)
        return FINISHED
    lock = _lock(sweep.out)
    try:
        if options.redo:
            for name in redo(sweep, options.redo):
                print_line(f"put aside: {name}")
        refuse_changed(sweep, tasks)
        write_sweep(sweep, origin)
        if options.slurm:
            submit(submissions(sweep, tasks, _words(options), options.sbatch_args), dry_run=False)
            return FINISHED
        return _report(
            run_tasks(
                sweep, tasks, _shop(sweep, options, origin), workers=options.jobs, say=print_line
            )
        )
    finally:
        lock.release()


def _one(sweep: Sweep, options: argparse.Namespace) -> int:
    """A task by its number. What it needs must be done; the sweep must be the one that was submitted."""
    if not 0 <= options.task < len(sweep.tasks):
        raise ConfigError(f"--task ({options.task}) must be in 0 .. {len(sweep.tasks) - 1}")
    try:
        submitted = json.loads((sweep.out / SWEEP_FILE).read_text(encoding="utf-8"))["digest"]
    except (OSError, ValueError, KeyError):
        raise ConfigError(
            f"{sweep.out / SWEEP_FILE} cannot be read: --task is for a sweep that was started or submitted"
        ) from None
    if submitted != sweep.digest():
        raise ConfigError(
            f"{options.file}, or a run file of it, has changed since this sweep was submitted: submit it again"
        )
    name = list(sweep.tasks)[options.task]
    needed = {each: task for each, task in select_task(sweep, name).items() if each != name}
    deadline = time.monotonic() + _SEEN_WITHIN
    while missing := [
        each for each, found in look(sweep, needed).items() if found.state is not State.DONE
    ]:
        if time.monotonic() > deadline:
            print(
                f"sweep: error: {name!r} needs {missing[0]!r}, which is not done",
                file=sys.stderr,
                flush=True,
            )
            return 1
        time.sleep(1.0)
    refuse_changed(sweep, select_task(sweep, name))
    outcomes = run_tasks(
        sweep,
        select_task(sweep, name),
        _shop(sweep, options, provenance()),
        workers=1,
        say=print_line,
    )
    return (
        DO_NOT_RESTART
        if any(each.word == "stopped" for each in outcomes.values())
        else _report(outcomes)
    )


def select_task(sweep: Sweep, name: str) -> Mapping[str, Task]:
    """A task and all that it needs, in order."""
    found = {name}
    for each in reversed(list(sweep.tasks)):
        if each in found:
            found |= set(sweep.tasks[each].needs)
    return {each: task for each, task in sweep.tasks.items() if each in found}


def _shop(sweep: Sweep, options: argparse.Namespace, origin: Mapping[str, str]) -> Shop:
    cores = len(os.sched_getaffinity(0))
    return Shop(
        sweep.out,
        threads=max(1, cores // options.jobs),
        retries=options.retries,
        provenance=origin,
        say=print_line,
    )


def _words(options: argparse.Namespace) -> list[str]:
    """The command of a Slurm task, without --task."""
    settings = [word for text in options.set for word in ("--set", text)]
    small = ["--small"] if options.small else []
    fixed = [
        "--output",
        str(options.output.resolve()),
        "--ranks",
        str(options.ranks),
        "--retries",
        str(options.retries),
    ]
    return [
        sys.executable,
        str(Path(__file__).resolve()),
        str(options.file.resolve()),
        *fixed,
        *small,
        *settings,
    ]


def _report(outcomes: Mapping[str, Outcome]) -> int:
    """The exit code, after one line for everything that is not done."""
    bad = {
        name: outcome
        for name, outcome in outcomes.items()
        if outcome.word in ("failed", "stopped", "blocked")
    }
    left = [name for name, outcome in outcomes.items() if outcome.word == "left"]
    for name, outcome in bad.items():
        print_line(f"{outcome.word}: {name}: {outcome.message}")
    if left:
        print_line(f"{len(left)} left to do: start it again to go on")
        return REQUEUE
    print_line(f"{len(bad)} not done" if bad else "all done")
    return FAILED if bad else FINISHED


def _lock(directory: Path) -> DirectoryLock:
    """Lock the folder of the sweep. Raise ConfigError where another process works in it."""
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
