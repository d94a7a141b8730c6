"""Read and validate a sweep file. examples/README.md describes every key."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from megatron_kd.config import ConfigError
from megatron_kd.sweep.plots.kinds import PLOT_KINDS

Values = dict[str, Any]
Key = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(strict=True, ge=0)]
Command = Annotated[list[Any], Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SweepSection(_Section):
    """Hold [sweep]: the text of the page, the seeds, the baseline and what is common to all.

    Attributes:
        seeds: Seeds that every cell is run with.
        baseline: Cell that all others are compared with. Of several, a cell is compared with the
            one of its own group.
        overrides: Overrides of every run file, those of jobs included.
        measure: Commands that are run on every finished run.
    """

    title: Key
    text: str = ""
    seeds: Annotated[list[Seed], Field(min_length=1)] = [1, 2, 3]
    baseline: str | list[str] | None = None
    overrides: Values = {}
    measure: list[Command] = []

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) != len(seeds):
            raise ValueError(
                "seeds must be different from each other: "
                "a seed that is counted twice makes the spread too small"
            )
        return seeds


class TaskSection(_Section):
    """Hold what [[job]] and [[cell]] have in common.

    Attributes:
        run: Run file, relative to the sweep file. Exclusive with `command`.
        command: Words of a command. Exclusive with `run`.
        overrides: Overrides of the run file.
        needs: Names or globs of the jobs that come first.
        vary: Lists whose product is taken, or tables of values.
        vary_small: Replaces `vary` under --small.
        ranks: Number of processes of the run.
    """

    name: Key
    run: str | None = None
    command: Command | None = None
    overrides: Values = {}
    needs: list[str] = []
    vary: dict[str, list[Any]] | list[Values] | None = None
    vary_small: dict[str, list[Any]] | list[Values] | None = None
    ranks: Annotated[int, Field(strict=True, ge=1)] | None = None

    @model_validator(mode="after")
    def _check(self) -> TaskSection:
        for name, vary in (("vary", self.vary), ("vary_small", self.vary_small)):
            if isinstance(vary, list) and len({tuple(values) for values in vary}) > 1:
                raise ValueError(f"{name}: each table of the list must have the same keys")
            lists = vary.values() if isinstance(vary, dict) else [vary] if vary is not None else []
            if not all(lists) or vary == {}:
                raise ValueError(
                    f"{name} has an empty list: give it at least one value, or leave it out"
                )
        if (self.run is None) == (self.command is None):
            raise ValueError(
                "a job or cell has either run = a run file, or command = a list of words"
            )
        if self.command is not None and (self.overrides or self.ranks is not None):
            raise ValueError("overrides and ranks are for run = a run file, not for a command")
        return self


class JobSection(TaskSection):
    """Hold a [[job]]: a preparation that is done once."""


class CellSection(TaskSection):
    """Hold a [[cell]]: a place of the grid, run once for every seed.

    Attributes:
        group: Cells of one group share plots and a baseline.
        paper: The source's figure for each metric, of all values or by value.
        measure: Replaces the `measure` of [sweep], which never applies to a cell with a command.
    """

    group: str = ""
    paper: dict[str, float | dict[str, float]] = {}
    measure: list[Command] | None = None


class MetricSection(_Section):
    """Hold a [[metric]]: a column of the table.

    Attributes:
        file: File inside the folder of the run: metrics.jsonl, or a JSON file.
        split: Validation split of metrics.jsonl. Default: training.
        key: Dotted path of the number.
        groups: Groups whose cells have the metric. Default: all. An empty list: the source alone.
    """

    name: Key
    file: Key = "metrics.jsonl"
    split: str | None = None
    key: Key
    unit: str = ""
    better: Literal["lower", "higher", "none"] = "none"
    groups: list[str] | None = None

    @field_validator("file")
    @classmethod
    def _check_file(cls, file: str) -> str:
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise ValueError("file must be a path inside the run's folder")
        return file


class PlotSection(_Section):
    """Hold a [[plot]]. Its kind, one of sweep/plots/kinds/, decides which keys it needs."""

    kind: str
    title: Key
    groups: list[str] | None = None
    key: str | None = None
    split: str | None = None
    x: str | None = None
    y: str | None = None
    by: str | None = None
    metric: str | None = None
    file: str | None = None
    points: str | None = None
    label: str | None = None
    unit: str = ""
    log_x: bool = False

    @field_validator("kind")
    @classmethod
    def _check_kind(cls, kind: str) -> str:
        if kind not in PLOT_KINDS:
            raise ValueError(f"{kind!r} is no kind of plot: choose one of {_quoted(PLOT_KINDS)}")
        return kind

    @model_validator(mode="after")
    def _check(self) -> PlotSection:
        kind = PLOT_KINDS[self.kind]
        missing = [name for name in kind.required_keys if getattr(self, name) is None]
        if missing:
            raise ValueError(f'a plot of kind "{self.kind}" needs {" and ".join(missing)}')
        if kind.x_choices and self.x is not None and self.x not in kind.x_choices:
            choices = " or ".join(f'"{choice}"' for choice in kind.x_choices)
            raise ValueError(f"x of a {self.kind} is {choices}")
        if (self.points is None) != (self.file is None):
            raise ValueError(
                "file and points go together: the JSON file in the run's folder, "
                "and the dotted path of its list"
            )
        return self

    def metrics(self) -> list[str]:
        """Return the names of the metrics that the plot shows."""
        if self.points is not None:
            return []
        return [str(getattr(self, key)) for key in PLOT_KINDS[self.kind].metric_keys]


class SweepFile(_Section):
    """Hold a sweep file as it is written, with its placeholders."""

    sweep: SweepSection
    variables: Values = {}
    small: Values = {}
    job: list[JobSection] = []
    cell: Annotated[list[CellSection], Field(min_length=1)]
    metric: list[MetricSection] = []
    plot: list[PlotSection] = []

    @model_validator(mode="after")
    def _check(self) -> SweepFile:
        metrics = [metric.name for metric in self.metric]
        repeated = {name for name in metrics if metrics.count(name) > 1}
        if repeated:
            raise ValueError(f"metric: two are named {sorted(repeated)[0]!r}")
        for cell in self.cell:
            for name in cell.paper:
                _check_metric(name, metrics, f"cell {cell.name!r}: paper")
        for plot in self.plot:
            for name in plot.metrics():
                _check_metric(name, metrics, f"plot {plot.title!r}")
            self._check_groups(plot)
        unknown = sorted({*self.small} - {*self.variables} - {"seeds", "cells"})
        if unknown:
            raise ValueError(
                f"small: {unknown[0]} replaces nothing: set it in [variables] too, "
                f"which has {_quoted(self.variables)}"
            )
        return self

    def _check_groups(self, plot: PlotSection) -> None:
        groups = [cell.group for cell in self.cell]
        # A group with a placeholder may get any name.
        if any("{" in group for group in groups):
            return
        for group in plot.groups or []:
            if group not in groups:
                raise ValueError(
                    f"plot {plot.title!r}: groups: no cell has the group {group!r}, "
                    f"groups are {_quoted(groups)}"
                )


def _check_metric(name: str, metrics: list[str], location: str) -> None:
    if name not in metrics:
        raise ValueError(f"{location}: {name!r} is no metric, metrics are {_quoted(metrics)}")


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, dict.fromkeys(names))) or "none"


def read_sweep_file(path: Path) -> SweepFile:
    """Read and validate a sweep file.

    Raises:
        ConfigError: The file cannot be read or is no sweep file. One sentence for each problem.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"sweep file {path} does not exist") from None
    except OSError as error:
        raise ConfigError(f"cannot read sweep file {path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    if "sweep" not in content:
        raise ConfigError(f"{path} has no [sweep]: it is no sweep file")
    try:
        return SweepFile.model_validate(content)
    except ValidationError as error:
        problems = dict.fromkeys(
            _sentence(path, content, dict(problem)) for problem in error.errors()
        )
        raise ConfigError("\n".join(problems)) from None


def _sentence(path: Path, content: dict[str, Any], error: dict[str, Any]) -> str:
    """Return which entry, by its name where it has one, which key, and what is wrong."""
    location = " ".join(_location(content, error))
    if error["type"] == "missing":
        return f"{path}: {location} is missing"
    if error["type"] == "extra_forbidden":
        return f"{path}: {location} is no key of a sweep file here"
    message = error["msg"][:1].lower() + error["msg"][1:]
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
    return f"{path}: {location}: {message}" if location else f"{path}: {message}"


def _location(content: dict[str, Any], error: dict[str, Any]) -> list[str]:
    """Return the names of the entries and keys that lead to a problem."""
    names: list[str] = []
    value: Any = content
    for part in error["loc"]:
        exists = isinstance(value, dict | list) and (isinstance(part, int) or part in value)
        value = value[part] if exists else None
        if isinstance(part, int):
            name = value.get("name", value.get("title")) if isinstance(value, dict) else None
            names.append(f"entry {part + 1}" if name is None else repr(name))
        # Branches of a union that pydantic tried are no keys of the file.
        elif value is not None or error["type"] in ("missing", "extra_forbidden"):
            names.append(str(part))
    return names
