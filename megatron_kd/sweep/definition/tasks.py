"""Hold the tasks and cells of a resolved sweep, and select among them."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_kd.config import ConfigError, RunConfig
from megatron_kd.sweep.definition.sweep_file import SweepFile

REPO = Path(__file__).parents[3]


@dataclass(frozen=True)
class TaskStep:
    """Hold one program of a task.

    Attributes:
        digest: Digest of the command without the path of the interpreter, or of the run file.
        config: Run file of a training run; None for a command.
    """

    name: str
    argv: tuple[str, ...]
    digest: str
    config: RunConfig | None = None


@dataclass(frozen=True)
class Task:
    """Hold what is started as one: a job, or a cell with one seed and its measurements.

    Attributes:
        folder: Folder of the task, relative to the sweep's.
        needs: Names of the tasks that come first.
        ranks: Number of processes.
    """

    name: str
    folder: str
    steps: tuple[TaskStep, ...]
    needs: tuple[str, ...]
    ranks: int = 1


@dataclass(frozen=True)
class Cell:
    """Hold a place of the grid.

    Attributes:
        values: The values that vary, by name.
        paper: The source's figures by metric.
        runs: Tasks by seed.
    """

    name: str
    group: str
    slug: str
    values: dict[str, Any]
    paper: dict[str, float]
    runs: dict[int, Task]


@dataclass(frozen=True)
class Sweep:
    """Hold a sweep file, resolved for one output folder.

    Attributes:
        tasks: Tasks by name, each after what it needs.
        skipped: Names of the cells that --small leaves out.
    """

    path: Path
    out: Path
    content: SweepFile
    seeds: tuple[int, ...]
    small: bool
    variables: dict[str, Any]
    cells: tuple[Cell, ...]
    tasks: dict[str, Task]
    skipped: tuple[str, ...] = field(default=())

    def levels(self) -> list[list[Task]]:
        """Return tasks in levels: needs lie in earlier levels, and cells come after all jobs."""
        depth: dict[str, int] = {}
        for name, task in self.tasks.items():
            depth[name] = 1 + max((depth[need] for need in task.needs), default=-1)
        jobs = {name for name, task in self.tasks.items() if task.folder.startswith("jobs/")}
        last = max((depth[name] for name in jobs), default=-1) + 1
        numbers = {name: depth[name] if name in jobs else last for name in self.tasks}
        return [
            [self.tasks[name] for name in numbers if numbers[name] == level]
            for level in range(last + 1)
        ]

    def digest(self) -> str:
        """Return a digest of all definitions; equal digests mean equal sweeps."""
        return digest(
            [
                [task.name, [step.digest for step in task.steps], list(task.needs)]
                for task in self.tasks.values()
            ]
        )


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def config_digest(config: RunConfig) -> str:
    """Return a digest of a run file without defaults, so that new keys do not change it."""
    return digest(config.model_dump(mode="json", exclude_defaults=True))


def with_needs(tasks: Mapping[str, Task], names: Iterable[str]) -> dict[str, Task]:
    """Return the tasks with these names and all that they need, in the order of `tasks`."""
    needed: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += tasks[name].needs
    return {name: task for name, task in tasks.items() if name in needed}


def select(sweep: Sweep, globs: Sequence[str]) -> dict[str, Task]:
    """Return the tasks that --only selects and what they need; without globs, all tasks.

    Raises:
        ConfigError: A glob matches nothing.
    """
    if not globs:
        return dict(sweep.tasks)
    return with_needs(sweep.tasks, match_tasks(sweep, globs, "--only"))


def match_tasks(sweep: Sweep, globs: Sequence[str], option: str) -> list[str]:
    """Return the names of the tasks that match by name, cell, folder or slug.

    Args:
        sweep: The sweep.
        globs: Patterns as in a shell.
        option: Option of the program that has the patterns, for the error message.

    Returns:
        Names of tasks, each once, in the order of the patterns.

    Raises:
        ConfigError: A glob matches nothing.
    """
    labels: dict[str, set[str]] = {
        name: {name, task.folder, Path(task.folder).name} for name, task in sweep.tasks.items()
    }
    for cell in sweep.cells:
        for task in cell.runs.values():
            labels[task.name] |= {cell.name, cell.slug}
            # "seed-1" alone would match every cell.
            labels[task.name].discard(Path(task.folder).name)
    matches: dict[str, None] = {}
    for glob in globs:
        names = [
            name
            for name, alternatives in labels.items()
            if any(fnmatch.fnmatchcase(label, glob) for label in alternatives)
        ]
        if not names:
            raise ConfigError(
                f"{option} {glob}: nothing of the sweep matches; --list shows its names"
            )
        matches |= dict.fromkeys(names)
    return list(matches)
