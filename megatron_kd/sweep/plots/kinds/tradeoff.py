"""Plot two metrics against each other, or two keys of a list in a JSON file of each run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_kd.sweep.definition.templating import as_text
from megatron_kd.sweep.plots.canvas import Canvas, line_style_of
from megatron_kd.sweep.plots.marks import draw_line, draw_points
from megatron_kd.sweep.plots.picture import (
    Picture,
    PlotKind,
    PlotPoint,
    PlotSeries,
    axis_label,
    missing_seeds,
    sample_text,
)
from megatron_kd.sweep.results.sweep_results import (
    CellResult,
    SeedValues,
    SweepResult,
    value_at,
)

Pairs = dict[str, tuple[float, float]]


def _make(result: SweepResult, plot: Mapping[str, Any], cells: Sequence[CellResult]) -> Picture:
    from_list = plot["points"] is not None
    series, counts = [], {}
    for cell in cells:
        make_points = _points_of_list if from_list else _point_of_metrics
        points, counts[cell.name] = make_points(cell, plot)
        if points:
            series.append(PlotSeries(cell.name, tuple(points)))
    x_label, y_label = (
        plot[axis] if from_list else axis_label(result, plot[axis]) for axis in ("x", "y")
    )
    return Picture(
        "tradeoff",
        plot["title"],
        x_label,
        y_label,
        tuple(series),
        log_x=plot["log_x"],
        notes=missing_seeds(result, cells, counts),
    )


def _point_of_metrics(cell: CellResult, plot: Mapping[str, Any]) -> tuple[list[PlotPoint], int]:
    """Return a cell's means of two metrics over the seeds that have both, and their number."""
    x, y = cell.samples[plot["x"]].values, cell.samples[plot["y"]].values
    pairs = [(x[seed], y[seed]) for seed in x if seed in y]
    return ([_mean_point(cell.name, plot, pairs)] if pairs else []), len(pairs)


def _points_of_list(cell: CellResult, plot: Mapping[str, Any]) -> tuple[list[PlotPoint], int]:
    """Return means over seeds of the entries that all seeds have, by label, and the seeds."""
    runs = [
        pairs
        for folder in cell.folders.values()
        if (pairs := _read_pairs(folder / plot["file"], plot)) is not None
    ]
    shared = [label for label in runs[0] if all(label in pairs for pairs in runs)] if runs else []
    points = []
    for label in shared:
        name = f"{cell.name}, {label}" if plot["label"] else cell.name
        points.append(_mean_point(name, plot, [pairs[label] for pairs in runs]))
    return points, len(runs)


def _read_pairs(path: Path, plot: Mapping[str, Any]) -> Pairs | None:
    """Return the finite points of a list in a JSON file by label, None if it cannot be read."""
    pairs: Pairs = {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for index, entry in enumerate(value_at(content, plot["points"])):
            label = str(index)
            if plot["label"]:
                label = f"{plot['label']} {as_text(value_at(entry, plot['label']))}"
            x, y = (float(value_at(entry, plot[axis])) for axis in ("x", "y"))
            if math.isfinite(x) and math.isfinite(y):
                pairs[label] = (x, y)
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None
    return pairs


def _mean_point(
    name: str, plot: Mapping[str, Any], pairs: Sequence[tuple[float, float]]
) -> PlotPoint:
    """Average the pairs of all seeds, at least one."""
    x, y = (SeedValues(dict(enumerate(values)), {}) for values in zip(*pairs, strict=True))
    text = f"{sample_text(name, plot['x'] + ' ', x)}; {sample_text(plot['y'], '', y)}"
    return PlotPoint(x.mean or 0.0, y.mean or 0.0, x.sd or 0.0, y.sd or 0.0, text)


def _draw(canvas: Canvas, picture: Picture) -> None:
    for number, series in enumerate(picture.series):
        if len(series.points) > 1:
            draw_line(canvas, series, number, line_style_of(number))
        draw_points(canvas, series, number)


KIND = PlotKind(
    name="tradeoff",
    required_keys=("x", "y"),
    make=_make,
    draw=_draw,
    metric_keys=("x", "y"),
    joins_points=False,
)
