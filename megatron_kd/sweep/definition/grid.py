"""Resolve a sweep file: expand placeholders and combinations, check every run, order the tasks."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_kd.config import ConfigError
from megatron_kd.sweep.definition.sweep_file import SweepFile, TaskSection, read_sweep_file
from megatron_kd.sweep.definition.task_maker import TaskMaker, match_needs
from megatron_kd.sweep.definition.tasks import REPO, Cell, Sweep, Task, with_needs
from megatron_kd.sweep.definition.templating import parse_setting, resolve_variables


def resolve(
    path: Path, out: Path, *, small: bool = False, settings: Sequence[str] = (), ranks: int = 1
) -> Sweep:
    """Resolve a sweep file for an output folder. Nothing is written.

    Args:
        path: The sweep file.
        out: Folder of everything that the sweep writes.
        small: Use the values of [small].
        settings: name=value texts that replace values of [variables].
        ranks: Processes of a run whose job or cell does not say.

    Returns:
        The sweep with its tasks in an order that can be worked off.

    Raises:
        ConfigError: Something cannot work. One sentence for each problem.
    """
    content = read_sweep_file(path)
    seeds = _seeds(path, content, small)
    variables = _variables(path, out.resolve(), content, small, settings)
    maker = TaskMaker(path, out.resolve(), content.sweep, variables, ranks)
    jobs = [
        maker.job(section, values)
        for section in content.job
        for values in _combinations(section, small)
    ]
    _check_folders(path, "job", [(job.name, job.folder) for job in jobs])
    tasks = _in_order(path, {job.name: job for job in jobs})
    all_cells = [
        maker.cell(section, values, seeds, list(tasks))
        for section in content.cell
        for values in _combinations(section, small)
    ]
    _check_folders(path, "cell", [(cell.name, cell.slug) for cell in all_cells])
    cells = _selected_cells(path, content, all_cells, small)
    skipped = [cell.name for cell in all_cells if cell not in cells]
    runs = {task.name: task for cell in cells for task in cell.runs.values()}
    tasks |= runs
    if skipped:
        # Jobs of cells that are left out are left out too.
        tasks = with_needs(tasks, runs)
    return Sweep(
        path,
        out.resolve(),
        content,
        seeds,
        small,
        variables,
        tuple(cells),
        tasks,
        tuple(skipped),
    )


def _variables(
    path: Path, out: Path, content: SweepFile, small: bool, settings: Sequence[str]
) -> dict[str, Any]:
    if not str(out).isprintable():
        raise ConfigError(f"--output {str(out)!r} has a newline or another control character")
    replaced = {
        name: value
        for name, value in content.small.items()
        if small and name not in ("seeds", "cells")
    }
    chosen = dict(parse_setting(text, content.variables) for text in settings)
    fixed = {
        "here": str(path.resolve().parent),
        "repo": str(REPO),
        "out": str(out),
        "python": sys.executable,
    }
    return resolve_variables({**content.variables, **replaced, **chosen}, fixed)


def _seeds(path: Path, content: SweepFile, small: bool) -> tuple[int, ...]:
    if not small:
        return tuple(content.sweep.seeds)
    seeds = tuple(content.small.get("seeds", content.sweep.seeds))
    if (
        not seeds
        or len(set(seeds)) != len(seeds)
        or not all(type(seed) is int and seed >= 0 for seed in seeds)
    ):
        raise ConfigError(
            f"{path}: small: seeds must be whole numbers, different from each other, at least one"
        )
    return seeds


def _combinations(section: TaskSection, small: bool) -> Iterator[dict[str, Any]]:
    """Yield the values of one entry: the product of its lists, or the tables as they are."""
    vary = section.vary_small if small and section.vary_small is not None else section.vary
    if vary is None:
        yield {}
    elif isinstance(vary, list):
        yield from vary
    else:
        for values in itertools.product(*vary.values()):
            yield dict(zip(vary, values, strict=True))


def _selected_cells(path: Path, content: SweepFile, cells: list[Cell], small: bool) -> list[Cell]:
    """Return all cells, or those that --small keeps; ConfigError for an unknown baseline."""
    globs = content.small.get("cells", ["*"]) if small else ["*"]
    selected = [
        cell for cell in cells if any(fnmatch.fnmatchcase(cell.name, glob) for glob in globs)
    ]
    if not selected:
        raise ConfigError(
            f"{path}: small: cells: no cell's name matches {', '.join(map(repr, globs))}"
        )
    baseline = content.sweep.baseline or []
    names = [cell.name for cell in cells]
    for name in [baseline] if isinstance(baseline, str) else baseline:
        # A small sweep may vary too little to have its baseline.
        if name not in names and not small:
            raise ConfigError(
                f"{path}: sweep: baseline: no cell is named {name!r}, "
                f"cells are {', '.join(map(repr, names))}"
            )
    return selected


def _check_folders(path: Path, kind: str, folders: Sequence[tuple[str, str]]) -> None:
    """Raise ConfigError if two entries would share a folder.

    Names that differ only in case share one on some file systems.

    Args:
        path: The sweep file, for the error message.
        kind: "job" or "cell".
        folders: Name and folder of each entry.

    Raises:
        ConfigError: Two entries would share a folder, or a name leaves none.
    """
    names: dict[str, str] = {}
    for name, folder in folders:
        if not folder or folder.endswith("/"):
            raise ConfigError(
                f"{path}: {kind} {name!r}: its name leaves no name for a folder: "
                "use ASCII letters or digits in it"
            )
        other = names.get(folder.casefold())
        names[folder.casefold()] = name
        if other is not None:
            raise ConfigError(
                f"{path}: {kind}s {other!r} and {name!r} would share the folder {folder!r}: "
                'put what varies into the name, as in "alpha {alpha}"'
            )


def _in_order(path: Path, jobs: dict[str, Task]) -> dict[str, Task]:
    """Return the jobs with their needs matched, each after what it needs."""
    waiting = {
        name: dataclasses.replace(job, needs=match_needs(path, job.needs, list(jobs), job.name))
        for name, job in jobs.items()
    }
    ordered: dict[str, Task] = {}
    while waiting:
        ready = [
            name for name, job in waiting.items() if all(need in ordered for need in job.needs)
        ]
        if not ready:
            raise ConfigError(
                f"{path}: jobs {', '.join(map(repr, waiting))} need each other in a circle"
            )
        ordered |= {name: waiting.pop(name) for name in ready}
    return ordered
