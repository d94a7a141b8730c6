"""Plot a key of metrics.jsonl over training, one curve for each cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_kd.sweep.plots.canvas import Canvas, colour_of, line_style_of
from megatron_kd.sweep.plots.picture import (
    Picture,
    PlotKind,
    PlotPoint,
    PlotSeries,
    count_seeds,
    format_number,
    missing_seeds,
)
from megatron_kd.sweep.results.sweep_results import (
    CellResult,
    SweepResult,
    read_metrics,
    value_at,
)

_MAX_POINTS = 200
# Curves with more points have tooltips, but no visible markers.
_MAX_MARKERS = 40


def _make(result: SweepResult, plot: Mapping[str, Any], cells: Sequence[CellResult]) -> Picture:
    x_name = plot["x"] or "step"
    series, counts = [], {}
    for cell in cells:
        curves = [
            curve
            for folder in cell.folders.values()
            if (curve := _read_curve(folder / "metrics.jsonl", plot, x_name)) is not None
        ]
        counts[cell.name] = len(curves)
        if curves:
            points = _with_texts(_mean_curve(curves), cell.name, x_name, plot["unit"], len(curves))
            series.append(PlotSeries(cell.name, points))
    key = f"{plot['key']}, {plot['split'] or 'training'}"
    return Picture(
        "curve",
        plot["title"],
        x_name,
        f"{key} ({plot['unit']})" if plot["unit"] else key,
        tuple(series),
        notes=missing_seeds(result, cells, counts),
        log_x=plot["log_x"],
    )


def _read_curve(path: Path, plot: Mapping[str, Any], x_name: str) -> dict[float, float] | None:
    """Return the finite values by x, None without any.

    Validation lines have no tokens: they are interpolated between training lines by step.
    """
    try:
        lines = read_metrics(path, plot["split"])
        training = lines if plot["split"] is None else read_metrics(path, None)
        steps = [0.0, *(line["step"] for line in training)]
        tokens = [0.0, *(line["tokens"] for line in training)]
        curve = {}
        for line in lines:
            value = value_at(line, plot["key"])
            if value is not None:
                x = np.interp(line["step"], steps, tokens) if x_name == "tokens" else line["step"]
                curve[float(x)] = float(value)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return curve or None


def _mean_curve(curves: Sequence[Mapping[float, float]]) -> list[PlotPoint]:
    """Average the curves of all seeds where all of them have a value.

    Elsewhere the mean would be of fewer seeds.
    """
    xs = sorted(set.intersection(*({*curve} for curve in curves)))
    values = np.array([[curve[x] for x in xs] for curve in curves], dtype=np.float64)
    return _binned(np.array(xs, dtype=np.float64), values)


def _binned(xs: NDArray[np.float64], values: NDArray[np.float64]) -> list[PlotPoint]:
    """Return mean and spread over seeds of values [seeds, n], averaged in bins along n.

    There are as many bins as points that can be told apart in the picture, at most.
    """
    points = []
    for members in np.array_split(np.arange(xs.size), min(xs.size, _MAX_POINTS)):
        means = values[:, members].mean(axis=1)
        spread = float(means.std(ddof=1)) if means.size > 1 else 0.0
        points.append(PlotPoint(float(xs[members].mean()), float(means.mean()), y_sd=spread))
    return points


def _with_texts(
    points: Sequence[PlotPoint], name: str, x_name: str, unit: str, seeds: int
) -> tuple[PlotPoint, ...]:
    texts = []
    for point in points:
        spread = f" ± {format_number(point.y_sd)}" if point.y_sd else ""
        value = f"{format_number(point.y)}{spread}{f' {unit}' if unit else ''}"
        texts.append(f"{name}: {value} at {x_name} {point.x:,.0f}, {count_seeds(seeds)}")
    return tuple(replace(point, text=text) for point, text in zip(points, texts, strict=True))


def _draw(canvas: Canvas, picture: Picture) -> None:
    highest, lowest = [], []
    for number, series in enumerate(picture.series):
        colour = colour_of(number)
        xs = [point.x for point in series.points]
        low = [point.y - point.y_sd for point in series.points]
        high = [point.y + point.y_sd for point in series.points]
        canvas.axes.fill_between(xs, low, high, color=colour, alpha=0.18, linewidth=0)
        ys = [point.y for point in series.points]
        style = {"color": colour, "linewidth": 1.8, "linestyle": line_style_of(number)}
        canvas.axes.plot(xs, ys, **style)
        # The first steps fall from ln(vocabulary): at their scale later differences are invisible.
        highest.append(max(high[len(high) // 12 :]))
        lowest.append(min(low))
    if not picture.series:
        return
    margin = 0.06 * max(max(highest) - min(lowest), 1e-6)
    limits = (min(lowest) - margin, max(highest) + margin)
    canvas.axes.set_ylim(*limits)
    for number, series in enumerate(picture.series):
        _draw_marks(canvas, series, colour_of(number), limits)


def _draw_marks(
    canvas: Canvas, series: PlotSeries, colour: str, limits: tuple[float, float]
) -> None:
    visible = len(series.points) <= _MAX_MARKERS
    stride = max(1, len(series.points) // _MAX_MARKERS)
    for point in dict.fromkeys([*series.points[::stride], *series.points[-1:]]):
        if limits[0] <= point.y <= limits[1]:
            style = {"markersize": 5 if visible else 9, "alpha": 1.0 if visible else 0.0}
            canvas.mark(point.x, point.y, point.text, "o", color=colour, **style)


KIND = PlotKind(
    name="curve",
    required_keys=("key",),
    make=_make,
    draw=_draw,
    caption="Mean over seeds; the band is one standard deviation.",
    x_choices=("tokens", "step"),
    has_markers=False,
    describes_last_point_only=True,
)
