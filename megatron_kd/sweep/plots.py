"""What the pictures of a sweep show: points with their spread, by series. No drawing here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_kd.sweep.results import Result, Row, Sample, dig, read_rows
from megatron_kd.sweep.templating import as_text

_MOST_POINTS = 200
Series64 = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """Where it is, how far it spreads (standard deviations, 0 where there is none), and what is said about it."""

    x: float
    y: float
    x_sd: float = 0.0
    y_sd: float = 0.0
    text: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one name. paper: the source's figures, drawn apart."""

    name: str
    points: tuple[Point, ...]
    paper: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Picture:
    """x_names: words for the places 0, 1, ... of an axis without numbers. notes: what is missing."""

    kind: str
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_names: tuple[str, ...] = ()
    log_x: bool = False
    notes: tuple[str, ...] = ()

    @property
    def alt(self) -> str:
        """The picture in words."""
        told = []
        for series in self.series:
            ends = series.points[-1:] if self.kind == "curve" else series.points
            told.append(
                f"{series.name}: "
                + ", ".join(point.text.removeprefix(f"{series.name}: ") for point in ends)
                + "."
            )
        return f"{self.title}. {self.y_label} against {self.x_label}. " + " ".join(told)


def pictures(result: Result) -> list[Picture]:
    """One for each [[plot]], in order."""
    makers = {"curve": _curve, "bars": _bars, "lines": _lines, "tradeoff": _tradeoff}
    return [
        makers[plot["kind"]](result, plot, result.group(plot["groups"]))
        for plot in result.content["plots"]
    ]


def number(value: float) -> str:
    """Five digits, without zeros at the end."""
    return f"{value:.5g}"


def _told(name: str, x: str, sample: Sample) -> str:
    spread = "" if sample.sd is None else f" ± {number(sample.sd)}"
    return (
        f"{name}: {x}{number(sample.mean or 0.0)}{spread}, {sample.n} seed{'s' * (sample.n != 1)}"
    )


def _axis(result: Result, name: str) -> str:
    return next(
        (
            f"{name} ({metric['unit']})" if metric["unit"] else name
            for metric in result.metrics
            if metric["name"] == name
        ),
        name,
    )


def _missing(rows: Sequence[Row], counts: Mapping[str, int], whole: int) -> tuple[str, ...]:
    return tuple(
        f"{row.name}: {counts.get(row.name, 0)} of {whole} seeds"
        for row in rows
        if counts.get(row.name, 0) < whole
    )


def _curve(result: Result, plot: Mapping[str, Any], rows: Sequence[Row]) -> Picture:
    x_name = plot["x"] or "step"
    series, counts = [], {}
    for row in rows:
        curves = [
            curve
            for folder in row.folders.values()
            if (curve := _rows(folder / "metrics.jsonl", plot, x_name)) is not None
        ]
        counts[row.name] = len(curves)
        if not curves:
            continue
        # Only where every seed has a row: elsewhere the mean would be of fewer.
        xs = sorted(set.intersection(*({*curve} for curve in curves)))
        values = np.array([[curve[x] for x in xs] for curve in curves], dtype=np.float64)
        points = _binned(np.array(xs, dtype=np.float64), values)
        unit = f" {plot['unit']}" if plot["unit"] else ""
        series.append(
            Series(
                row.name,
                tuple(_said(point, row.name, x_name, len(curves), unit) for point in points),
            )
        )
    what = f"{plot['key']}, {plot['split'] or 'training'}"
    label = f"{what} ({plot['unit']})" if plot["unit"] else what
    return Picture(
        "curve",
        plot["title"],
        x_name,
        label,
        tuple(series),
        notes=_missing(rows, counts, result.seeds),
        log_x=plot["log_x"],
    )


def _rows(path: Any, plot: Mapping[str, Any], x_name: str) -> dict[float, float] | None:
    """x -> value of the finite rows. Validation rows have no tokens: those of the training row of the same step, or in between."""
    try:
        rows = read_rows(path, plot["split"])
        training = rows if plot["split"] is None else read_rows(path, None)
        found = {}
        steps, tokens = (
            [0.0, *(row["step"] for row in training)],
            [0.0, *(row["tokens"] for row in training)],
        )
        for row in rows:
            value = dig(row, plot["key"])
            if value is not None:
                found[
                    float(np.interp(row["step"], steps, tokens))
                    if x_name == "tokens"
                    else float(row["step"])
                ] = float(value)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found or None


def _binned(xs: Series64, values: Series64) -> list[Point]:
    """Mean and spread over seeds [seeds, n]; neighbours are averaged where there are more than can be seen."""
    bins = np.array_split(np.arange(xs.size), min(xs.size, _MOST_POINTS))
    found = []
    for members in bins:
        seeds = values[:, members].mean(axis=1)
        spread = float(seeds.std(ddof=1)) if seeds.size > 1 else 0.0
        found.append(Point(float(xs[members].mean()), float(seeds.mean()), y_sd=spread))
    return found


def _said(point: Point, name: str, x_name: str, seeds: int, unit: str) -> Point:
    spread = f" ± {number(point.y_sd)}" if point.y_sd else ""
    text = f"{name}: {number(point.y)}{spread}{unit} at {x_name} {point.x:,.0f}, {seeds} seed{'s' * (seeds != 1)}"
    return Point(point.x, point.y, point.x_sd, point.y_sd, text)


def _bars(result: Result, plot: Mapping[str, Any], rows: Sequence[Row]) -> Picture:
    name = plot["metric"]
    series = []
    for row in rows:
        sample = row.samples[name]
        if sample.mean is None:
            continue
        paper = (
            (Point(row.paper[name], 0.0, text=f"{row.name}, paper: {number(row.paper[name])}"),)
            if name in row.paper
            else ()
        )
        point = Point(sample.mean, 0.0, x_sd=sample.sd or 0.0, text=_told(row.name, "", sample))
        series.append(Series(row.name, (point,), paper))
    counts = {row.name: row.samples[name].n for row in rows}
    return Picture(
        "bars",
        plot["title"],
        _axis(result, name),
        "cell",
        tuple(series),
        notes=_missing(rows, counts, result.seeds),
    )


def _lines(result: Result, plot: Mapping[str, Any], rows: Sequence[Row]) -> Picture:
    name, x_name, by = plot["metric"], plot["x"], plot["by"]
    with_x = [row for row in rows if x_name in row.values]
    given = list(
        dict.fromkeys(
            row.values[x_name] for row in with_x if not isinstance(row.values[x_name], list | dict)
        )
    )
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in given)
    place = {
        as_text(value): float(value) if numbers else float(index)
        for index, value in enumerate(given)
    }
    grouped: dict[str, list[tuple[Point, Point | None]]] = {}
    for row in with_x:
        sample, text = row.samples[name], as_text(row.values[x_name])
        if sample.mean is None or text not in place:
            continue
        line = (
            f"{by} = {as_text(row.values[by])}"
            if by is not None and by in row.values
            else (row.group or result.content["title"])
        )
        point = Point(
            place[text],
            sample.mean,
            y_sd=sample.sd or 0.0,
            text=_told(line, f"at {x_name} {text}: ", sample),
        )
        said = (
            f"{line}, paper: {number(row.paper[name])} at {x_name} {text}"
            if name in row.paper
            else ""
        )
        grouped.setdefault(line, []).append(
            (point, Point(place[text], row.paper[name], text=said) if said else None)
        )
    series = []
    for line, members in grouped.items():
        members.sort(key=lambda pair: pair[0].x)
        series.append(
            Series(
                line,
                tuple(point for point, _ in members),
                tuple(paper for _, paper in members if paper is not None),
            )
        )
    counts = {row.name: row.samples[name].n for row in rows}
    names = () if numbers else tuple(place)
    notes = _missing(with_x, counts, result.seeds)
    return Picture(
        "lines",
        plot["title"],
        x_name,
        _axis(result, name),
        tuple(series),
        names,
        plot["log_x"],
        notes,
    )


def _tradeoff(result: Result, plot: Mapping[str, Any], rows: Sequence[Row]) -> Picture:
    series, counts = [], {}
    for row in rows:
        points, counts[row.name] = (
            _along(row, plot) if plot["points"] is not None else _one(row, plot)
        )
        if points:
            series.append(Series(row.name, tuple(points)))
    own = plot["points"] is not None
    x_label, y_label = (plot[axis] if own else _axis(result, plot[axis]) for axis in "xy")
    notes = _missing(rows, counts, result.seeds)
    return Picture(
        "tradeoff", plot["title"], x_label, y_label, tuple(series), log_x=plot["log_x"], notes=notes
    )


def _one(row: Row, plot: Mapping[str, Any]) -> tuple[list[Point], int]:
    """A cell's means of two metrics, over the seeds that have both."""
    one, two = row.samples[plot["x"]], row.samples[plot["y"]]
    both = [seed for seed in one.values if seed in two.values]
    return _point(row.name, plot, [(one.values[seed], two.values[seed]) for seed in both], ""), len(
        both
    )


def _point(
    name: str, plot: Mapping[str, Any], pairs: Sequence[tuple[float, float]], label: str
) -> list[Point]:
    if not pairs:
        return []
    x, y = (Sample(dict(enumerate(values)), {}) for values in zip(*pairs, strict=True))
    at = f", {label}" if label else ""
    text = f"{_told(f'{name}{at}', plot['x'] + ' ', x)}; {_told(plot['y'], '', y)}"
    return [Point(x.mean or 0.0, y.mean or 0.0, x.sd or 0.0, y.sd or 0.0, text)]


def _along(row: Row, plot: Mapping[str, Any]) -> tuple[list[Point], int]:
    """A cell's points along a list of its JSON file: means over seeds of the entries of one label, where every seed has it."""
    found: list[dict[str, tuple[float, float]]] = []
    for folder in row.folders.values():
        try:
            entries = dig(
                json.loads((folder / plot["file"]).read_text(encoding="utf-8")), plot["points"]
            )
            pairs = {}
            for index, entry in enumerate(entries):
                label = (
                    f"{plot['label']} {as_text(dig(entry, plot['label']))}"
                    if plot["label"]
                    else str(index)
                )
                x, y = float(dig(entry, plot["x"])), float(dig(entry, plot["y"]))
                if math.isfinite(x) and math.isfinite(y):
                    pairs[label] = (x, y)
            found.append(pairs)
        except (OSError, ValueError, KeyError, IndexError, TypeError):
            continue
    shared = (
        [label for label in found[0] if all(label in pairs for pairs in found)] if found else []
    )
    points = [
        point
        for label in shared
        for point in _point(
            row.name, plot, [pairs[label] for pairs in found], label if plot["label"] else ""
        )
    ]
    return points, len(found)
