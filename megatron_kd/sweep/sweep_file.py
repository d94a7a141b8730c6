"""The sweep file: what is run, over which values and seeds, and what is shown of it. Every key stands in examples/README.md."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from megatron_kd.config import ConfigError

Scalar = bool | int | float | str
Values = dict[str, Any]
Key = Annotated[str, Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SweepPart(_Part):
    """[sweep]: what the page says, the seeds of every cell, what each is compared with (of several, the one of its group), and overrides
    of every run file, jobs' too."""

    title: Key
    text: str = ""
    seeds: Annotated[list[Annotated[int, Field(strict=True, ge=0)]], Field(min_length=1)] = [
        1,
        2,
        3,
    ]
    baseline: str | list[str] | None = None
    overrides: Values = {}
    measure: list[Annotated[list[Any], Field(min_length=1)]] = []

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) != len(seeds):
            raise ValueError(
                "seeds must be different from each other: a seed that is counted twice makes the spread too small"
            )
        return seeds


class Work(_Part):
    """What a [[job]] and a [[cell]] have in common: a run file with overrides, or a command; what it needs; what it varies."""

    name: Key
    run: str | None = None
    command: Annotated[list[Any], Field(min_length=1)] | None = None
    overrides: Values = {}
    needs: list[str] = []
    vary: dict[str, list[Any]] | list[Values] | None = None
    vary_small: dict[str, list[Any]] | list[Values] | None = None
    ranks: Annotated[int, Field(strict=True, ge=1)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Work:
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


class JobPart(Work):
    """[[job]]: preparation, once each."""


class CellPart(Work):
    """[[cell]]: a place of the grid, run once for every seed. With a command the sweep's `measure` does not apply."""

    group: str = ""
    paper: dict[str, float | dict[str, float]] = {}
    measure: list[Annotated[list[Any], Field(min_length=1)]] | None = None


class MetricPart(_Part):
    """[[metric]]: a column of the table. file is in the run's folder: metrics.jsonl or JSON. groups: whose cells have it; None: all."""

    name: Key
    file: Key = "metrics.jsonl"
    split: str | None = None
    key: Key
    unit: str = ""
    better: Literal["lower", "higher", "none"] = "none"
    groups: list[str] | None = None

    @field_validator("file")
    @classmethod
    def _inside(cls, file: str) -> str:
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise ValueError("file must be a path inside the run's folder")
        return file


_PLOT_NEEDS = {
    "curve": ("key",),
    "bars": ("metric",),
    "lines": ("metric", "x"),
    "tradeoff": ("x", "y"),
}


class PlotPart(_Part):
    """[[plot]]: a picture. Which keys a kind takes is checked here."""

    kind: Literal["curve", "bars", "lines", "tradeoff"]
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

    @model_validator(mode="after")
    def _complete(self) -> PlotPart:
        missing = [name for name in _PLOT_NEEDS[self.kind] if getattr(self, name) is None]
        if missing:
            raise ValueError(f'a plot of kind "{self.kind}" needs {" and ".join(missing)}')
        if self.kind == "curve" and self.x not in (None, "tokens", "step"):
            raise ValueError('x of a curve is "tokens" or "step"')
        if (self.points is None) != (self.file is None):
            raise ValueError(
                "file and points go together: the JSON file in the run's folder, and the dotted path of its list"
            )
        return self


class SweepFile(_Part):
    """A sweep file as it stands: nothing in braces is replaced yet."""

    sweep: SweepPart
    variables: Values = {}
    small: Values = {}
    job: list[JobPart] = []
    cell: Annotated[list[CellPart], Field(min_length=1)]
    metric: list[MetricPart] = []
    plot: list[PlotPart] = []

    @model_validator(mode="after")
    def _check(self) -> SweepFile:
        metrics = [metric.name for metric in self.metric]
        twice = {name for name in metrics if metrics.count(name) > 1}
        if twice:
            raise ValueError(f"metric: two are named {sorted(twice)[0]!r}")
        for cell in self.cell:
            for name in cell.paper:
                _known(name, metrics, f"cell {cell.name!r}: paper")
        groups = [cell.group for cell in self.cell]
        for plot in self.plot:
            where = f"plot {plot.title!r}"
            asked = (
                [plot.metric]
                if plot.kind in ("bars", "lines")
                else [plot.x, plot.y]
                if plot.kind == "tradeoff"
                else []
            )
            for found in asked if plot.points is None else []:
                _known(str(found), metrics, where)
            for group in plot.groups or []:
                if group not in groups and not any("{" in each for each in groups):
                    raise ValueError(
                        f"{where}: groups: no cell has the group {group!r}, groups are {_list(groups)}"
                    )
        unknown = sorted({*self.small} - {*self.variables} - {"seeds", "cells"})
        if unknown:
            raise ValueError(
                f"small: {unknown[0]} replaces nothing: set it in [variables] too, which has {_list(self.variables)}"
            )
        return self


def _known(name: str, metrics: list[str], where: str) -> None:
    if name not in metrics:
        raise ValueError(f"{where}: {name!r} is no metric, metrics are {_list(metrics)}")


def _list(names: Any) -> str:
    return ", ".join(map(repr, dict.fromkeys(names))) or "none"


def read_sweep_file(path: Path) -> SweepFile:
    """ConfigError, one sentence a problem, where the file cannot be read or is no sweep file."""
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
        problems = dict.fromkeys(_sentence(path, content, dict(found)) for found in error.errors())
        raise ConfigError("\n".join(problems)) from None


def _sentence(path: Path, content: dict[str, Any], error: dict[str, Any]) -> str:
    """Which entry, by its name where it has one, which key, and what is wrong."""
    where: list[str] = []
    place: Any = content
    for part in error["loc"]:
        place = (
            place[part]
            if isinstance(place, dict | list) and (isinstance(part, int) or part in place)
            else None
        )
        if isinstance(part, int):
            name = place.get("name", place.get("title")) if isinstance(place, dict) else None
            where.append(f"entry {part + 1}" if name is None else repr(name))
        elif place is not None or error["type"] in ("missing", "extra_forbidden"):
            where.append(str(part))
    what = {"missing": "is missing", "extra_forbidden": "is no key of a sweep file here"}.get(
        error["type"]
    )
    if what is None:
        what = (
            str(error["ctx"]["error"])
            if error["type"] == "value_error"
            else error["msg"][:1].lower() + error["msg"][1:]
        )
    return f"{path}: {' '.join(where)}{': ' if where and error['type'] not in ('missing', 'extra_forbidden') else ' '}{what}".replace(
        ":  ", ": "
    )
