"""From a sweep file to tasks: every name filled in, every combination by itself, every run checked, in an order that can be worked off."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_kd.config import ConfigError, RunConfig, load_config
from megatron_kd.sweep.sweep_file import CellPart, JobPart, SweepFile, Work, read_sweep_file
from megatron_kd.sweep.templating import (
    as_text,
    check_name,
    fill,
    parse_setting,
    resolve_variables,
    slug,
)

REPO = Path(__file__).parents[2]


@dataclass(frozen=True)
class Step:
    """One program of a task. digest: of what it is told, the interpreter's path apart. config: of a training run."""

    name: str
    argv: tuple[str, ...]
    digest: str
    config: RunConfig | None = None


@dataclass(frozen=True)
class Task:
    """What is started as one: a job, or a cell with one seed and what is measured on it. folder: relative to the sweep's."""

    name: str
    folder: str
    steps: tuple[Step, ...]
    needs: tuple[str, ...]
    ranks: int = 1


@dataclass(frozen=True)
class Cell:
    """A place of the grid. runs: seed -> task. paper: metric -> the source's figure."""

    name: str
    group: str
    slug: str
    values: dict[str, Any]
    paper: dict[str, float]
    runs: dict[int, Task]


@dataclass(frozen=True)
class Sweep:
    """A sweep file, resolved for one output folder. tasks: by name, each after what it needs."""

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
        """Tasks whose needs lie in earlier levels; cells come after all jobs."""
        depth: dict[str, int] = {}
        for name, task in self.tasks.items():
            depth[name] = 1 + max((depth[need] for need in task.needs), default=-1)
        jobs = [depth[name] for name, task in self.tasks.items() if task.folder.startswith("jobs/")]
        last = max(jobs, default=-1) + 1
        numbers = {
            name: depth[name] if task.folder.startswith("jobs/") else last
            for name, task in self.tasks.items()
        }
        return [
            [self.tasks[name] for name in numbers if numbers[name] == level]
            for level in range(last + 1)
        ]

    def digest(self) -> str:
        """Of all definitions: equal digests, equal sweeps."""
        return digest(
            [
                [task.name, [step.digest for step in task.steps], list(task.needs)]
                for task in self.tasks.values()
            ]
        )


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def config_digest(config: RunConfig) -> str:
    """Of what a run file says and its defaults do not: a later version's new keys leave it as it is."""
    return digest(config.model_dump(mode="json", exclude_defaults=True))


def resolve(
    path: Path, out: Path, *, small: bool = False, settings: Sequence[str] = (), ranks: int = 1
) -> Sweep:
    """The sweep of a file in the folder `out`. ConfigError, one sentence a problem, for anything that cannot work; nothing is written.

    settings: name=value for [variables]. ranks: processes of a run whose job or cell does not say.
    """
    content = read_sweep_file(path)
    replaced = {
        name: value
        for name, value in content.small.items()
        if small and name not in ("seeds", "cells")
    }
    chosen = dict(parse_setting(text, content.variables) for text in settings)
    here, out = path.resolve().parent, out.resolve()
    if not str(out).isprintable():
        raise ConfigError(f"--output {str(out)!r} has a newline or another control character")
    fixed = {"here": str(here), "repo": str(REPO), "out": str(out), "python": sys.executable}
    variables = resolve_variables({**content.variables, **replaced, **chosen}, fixed)
    seeds = (
        tuple(content.small.get("seeds", content.sweep.seeds))
        if small
        else tuple(content.sweep.seeds)
    )
    if (
        not seeds
        or len(set(seeds)) != len(seeds)
        or not all(type(seed) is int and seed >= 0 for seed in seeds)
    ):
        raise ConfigError(
            f"{path}: small: seeds must be whole numbers, different from each other, at least one"
        )
    maker = _Maker(path, out, variables, small, ranks, content)
    jobs = [maker.job(job, values) for job in content.job for values in _combinations(job, small)]
    _different(path, "job", [(job.name, job.folder) for job in jobs])
    order = _in_order(path, maker.needs, {job.name: job for job in jobs})
    cells, skipped = _cells(maker, seeds, list(order))
    runs = {task.name: task for cell in cells for task in cell.runs.values()}
    tasks = {**order, **runs}
    needed = _needed(tasks, runs)
    tasks = {name: task for name, task in tasks.items() if name in needed or not skipped}
    return Sweep(
        path,
        out,
        content,
        seeds,
        small,
        variables,
        tuple(cells),
        tasks,
        tuple(cell.name for cell in skipped),
    )


def _cells(
    maker: _Maker, seeds: Sequence[int], jobs: Sequence[str]
) -> tuple[list[Cell], list[Cell]]:
    """The grid, and the cells that --small leaves out."""
    path, content, small = maker.path, maker.content, maker.small
    globs = content.small.get("cells", ["*"]) if small else ["*"]
    every = [
        maker.cell(part, values, seeds, jobs)
        for part in content.cell
        for values in _combinations(part, small)
    ]
    _different(path, "cell", [(cell.name, cell.slug) for cell in every])
    cells = [cell for cell in every if any(fnmatch.fnmatchcase(cell.name, glob) for glob in globs)]
    if not cells:
        raise ConfigError(
            f"{path}: small: cells: no cell's name matches {', '.join(map(repr, globs))}"
        )
    names = [cell.name for cell in every]
    baseline = content.sweep.baseline
    for wanted in (
        [] if baseline is None or small else [baseline] if isinstance(baseline, str) else baseline
    ):
        if wanted not in names:
            raise ConfigError(
                f"{path}: sweep: baseline: no cell is named {wanted!r}, cells are {', '.join(map(repr, names))}"
            )
    return cells, [cell for cell in every if cell not in cells]


def _combinations(part: Work, small: bool) -> Iterator[dict[str, Any]]:
    """Values of one entry: the product of its lists, or the tables as they are."""
    vary = part.vary_small if small and part.vary_small is not None else part.vary
    if vary is None:
        yield {}
    elif isinstance(vary, list):
        yield from vary
    else:
        yield from (
            dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())
        )


def _different(path: Path, kind: str, names: Sequence[tuple[str, str]]) -> None:
    """ConfigError where two entries would share a folder, on file systems that do not tell A from a too."""
    seen: dict[str, str] = {}
    for name, place in names:
        if not place or place.endswith("/"):
            raise ConfigError(
                f"{path}: {kind} {name!r}: its name leaves no name for a folder: use ASCII letters or digits in it"
            )
        other = seen.get(place.casefold())
        seen[place.casefold()] = name
        if other is not None:
            raise ConfigError(
                f"{path}: {kind}s {other!r} and {name!r} would share the folder {place!r}: put what varies into the name, as in "
                '"alpha {alpha}"'
            )


def _in_order(
    path: Path, needs: Mapping[str, tuple[str, ...]], jobs: dict[str, Task]
) -> dict[str, Task]:
    """Jobs with each after what it needs. ConfigError for a circle."""
    done: dict[str, Task] = {}
    waiting = {
        name: Task(
            job.name,
            job.folder,
            job.steps,
            match_needs(path, needs[name], list(jobs), job.name),
            job.ranks,
        )
        for name, job in jobs.items()
    }
    while waiting:
        ready = [name for name, job in waiting.items() if all(need in done for need in job.needs)]
        if not ready:
            raise ConfigError(
                f"{path}: jobs {', '.join(map(repr, waiting))} need each other in a circle"
            )
        done |= {name: waiting.pop(name) for name in ready}
    return done


def match_needs(path: Path, needs: Sequence[str], jobs: Sequence[str], who: str) -> tuple[str, ...]:
    """Names of jobs, by name or glob. ConfigError for one that is none."""
    found: dict[str, None] = {}
    for need in needs:
        matching = [need] if need in jobs else fnmatch.filter(jobs, need)
        if not matching:
            raise ConfigError(
                f"{path}: {who!r} needs {need!r}, and no job has that name: jobs are {', '.join(map(repr, jobs)) or 'none'}"
            )
        found |= dict.fromkeys(matching)
    return tuple(found)


def _needed(tasks: Mapping[str, Task], wanted: Mapping[str, Task]) -> set[str]:
    """Names of `wanted` and of all that they need."""
    found: set[str] = set()
    waiting = list(wanted)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += tasks[name].needs
    return found


def select(sweep: Sweep, globs: Sequence[str]) -> dict[str, Task]:
    """Tasks whose name, cell or folder matches one of `globs`, and what they need. ConfigError for a glob that matches nothing."""
    if not globs:
        return dict(sweep.tasks)
    chosen = {name: sweep.tasks[name] for name in matching(sweep, globs, "--only")}
    needed = _needed(sweep.tasks, chosen)
    return {name: task for name, task in sweep.tasks.items() if name in needed}


def matching(sweep: Sweep, globs: Sequence[str], option: str) -> list[str]:
    """Names of the tasks that a glob matches by name, cell, folder or slug."""
    called: dict[str, set[str]] = {
        name: {name, task.folder, Path(task.folder).name} for name, task in sweep.tasks.items()
    }
    for cell in sweep.cells:
        for task in cell.runs.values():
            called[task.name] |= {cell.name, cell.slug}
            called[task.name].discard(Path(task.folder).name)
    found: dict[str, None] = {}
    for glob in globs:
        here = [
            name
            for name, names in called.items()
            if any(fnmatch.fnmatchcase(each, glob) for each in names)
        ]
        if not here:
            raise ConfigError(
                f"{option} {glob}: nothing of the sweep matches; --list shows its names"
            )
        found |= dict.fromkeys(here)
    return list(found)


class _Maker:
    """Makes the tasks of one sweep."""

    def __init__(
        self,
        path: Path,
        out: Path,
        variables: dict[str, Any],
        small: bool,
        ranks: int,
        content: SweepFile,
    ) -> None:
        self.path, self._out, self._variables, self._ranks, self.content = (
            path,
            out,
            variables,
            ranks,
            content,
        )
        self.small = small
        self.needs: dict[str, tuple[str, ...]] = {}

    def job(self, part: JobPart, given: Mapping[str, Any]) -> Task:
        names, name = self._named(part, given, "job")
        place = f"jobs/{slug(name)}" if slug(name) else ""
        where = f"{self.path}: job {name!r}"
        names |= {"run": str(self._out / place)}
        self.needs[name] = tuple(fill(part.needs, names, f"{where}: needs"))
        steps = (
            self._run(part, names, where, seed=None)
            if part.run is not None
            else self._command("command", part.command or [], names, where),
        )
        return Task(
            name, place, steps, (), (part.ranks or self._ranks) if part.run is not None else 1
        )

    def cell(
        self, part: CellPart, given: Mapping[str, Any], seeds: Sequence[int], jobs: Sequence[str]
    ) -> Cell:
        names, name = self._named(part, given, "cell")
        where, runs = f"{self.path}: cell {name!r}", {}
        for seed in seeds:
            place = f"runs/{slug(name)}/seed-{seed}"
            own = {**names, "seed": seed, "run": str(self._out / place)}
            measures = part.measure or []
            if part.run is not None:
                steps = [self._run(part, own, where, seed=seed)]
                measures = self.content.sweep.measure if part.measure is None else part.measure
            else:
                steps = [self._command("command", part.command or [], own, where)]
            steps += [
                self._command(f"measure-{number}", words, own, where)
                for number, words in enumerate(measures, 1)
            ]
            needs = match_needs(self.path, fill(part.needs, own, f"{where}: needs"), jobs, name)
            ranks = 1 if part.run is None else part.ranks or self._ranks
            runs[seed] = Task(f"{name}, seed {seed}", place, tuple(steps), needs, ranks)
        group = as_text(fill(part.group, names, f"{where}: group"))
        values = {key: names[key] for key in given}
        return Cell(
            name, group, slug(name), values, _paper(part, name, list(values.values()), where), runs
        )

    def _named(self, part: Work, given: Mapping[str, Any], kind: str) -> tuple[dict[str, Any], str]:
        """All names for one combination, and its own."""
        where = f"{self.path}: {kind} {part.name!r}"
        for name in given:
            check_name(name, f"{where}: vary")
        values = {
            name: fill(value, self._variables, f"{where}: vary") for name, value in given.items()
        }
        names = {**self._variables, **values}
        return names, as_text(fill(part.name, names, f"{where}: name"))

    def _command(
        self, name: str, words: Sequence[Any], names: Mapping[str, Any], where: str
    ) -> Step:
        argv = tuple(as_text(word) for word in fill(list(words), names, f"{where}: {name}"))
        if any("\0" in word for word in argv):
            raise ConfigError(f"{where}: {name}: a word has a zero byte")
        # The interpreter may move: what it is told may not change.
        told = [as_text(word) for word in fill(list(words), {**names, "python": "{python}"}, where)]
        return Step(name, argv, digest(told))

    def _run(self, part: Work, names: Mapping[str, Any], where: str, *, seed: int | None) -> Step:
        file = self.path.resolve().parent / as_text(fill(part.run, names, f"{where}: run"))
        values = fill(
            {**self.content.sweep.overrides, **part.overrides}, names, f"{where}: overrides"
        )
        set_here = {"run.directory": names["run"]} | ({} if seed is None else {"train.seed": seed})
        for key in set_here:
            if key in values:
                raise ConfigError(
                    f"{where}: overrides: {key} is set by the sweep itself: leave it out"
                )
        arguments = [
            "--config",
            str(file),
            *(f"--{key}={as_text(value)}" for key, value in {**values, **set_here}.items()),
        ]
        try:
            config = load_config(arguments)
        except ConfigError as error:
            raise ConfigError(
                "\n".join(f"{where}: {line}" for line in str(error).splitlines())
            ) from None
        ranks = part.ranks or self._ranks
        launch = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            if ranks > 1
            else []
        )
        return Step(
            "run",
            (sys.executable, *launch, "-m", "megatron_kd.pretrain", *arguments),
            config_digest(config),
            config,
        )


def _paper(part: CellPart, name: str, values: Sequence[Any], where: str) -> dict[str, float]:
    """The source's figure for each metric: one for all values, or by the cell's name or its values, joined by ", "."""
    found = {}
    for metric, figure in part.paper.items():
        if not isinstance(figure, dict):
            found[metric] = figure
            continue
        for key, value in figure.items():
            given = [text.strip() for text in key.split(",")]
            if key == name or (len(given) == len(values) and all(map(_same, given, values))):
                found[metric] = value
        everything = part.vary or []
        combinations = (
            list(itertools.product(*everything.values()))
            if isinstance(everything, dict)
            else [tuple(each.values()) for each in everything]
        )
        for key in figure:
            given = [text.strip() for text in key.split(",")]
            matches = any(
                len(given) == len(each) and all(map(_same, given, each)) for each in combinations
            )
            if not matches and key != name and not _is_other_name(key, part):
                raise ConfigError(
                    f"{where}: paper: {metric}: {key!r} is none of the values that vary"
                )
    return found


def _is_other_name(key: str, part: CellPart) -> bool:
    """Whether a key may be the name of a sibling, by what its name begins with."""
    head = part.name.partition("{")[0]
    return bool(head) and key.startswith(head)


def _same(text: str, value: Any) -> bool:
    if text == as_text(value):
        return True
    try:
        return not isinstance(value, bool | str) and float(text) == float(value)
    except (TypeError, ValueError):
        return False
