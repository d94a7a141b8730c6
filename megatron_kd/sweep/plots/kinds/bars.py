"""Plot one metric of every cell, one line for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_kd.sweep.plots.canvas import COLOURS, MUTED, Canvas
from megatron_kd.sweep.plots.picture import (
    Picture,
    PlotKind,
    PlotPoint,
    PlotSeries,
    axis_label,
    format_number,
    missing_seeds,
    sample_text,
)
from megatron_kd.sweep.results.sweep_results import CellResult, SweepResult


def _make(result: SweepResult, plot: Mapping[str, Any], cells: Sequence[CellResult]) -> Picture:
    name = plot["metric"]
    series = [_series(cell, name) for cell in cells if cell.samples[name].mean is not None]
    counts = {cell.name: cell.samples[name].n for cell in cells}
    return Picture(
        "bars",
        plot["title"],
        axis_label(result, name),
        "cell",
        tuple(series),
        notes=missing_seeds(result, cells, counts),
    )


def _series(cell: CellResult, metric: str) -> PlotSeries:
    sample = cell.samples[metric]
    text = sample_text(cell.name, "", sample)
    point = PlotPoint(sample.mean or 0.0, 0.0, x_sd=sample.sd or 0.0, text=text)
    if metric not in cell.paper:
        return PlotSeries(cell.name, (point,))
    figure = cell.paper[metric]
    paper = PlotPoint(figure, 0.0, text=f"{cell.name}, paper: {format_number(figure)}")
    return PlotSeries(cell.name, (point,), (paper,))


def _draw(canvas: Canvas, picture: Picture) -> None:
    """Draw bars from zero if zero is near, else points: a cut bar would be misleading."""
    axes = canvas.axes
    means = [series.points[0].x for series in picture.series]
    from_zero = bool(means) and 0 <= min(means) <= 0.6 * max(means)
    for position, series in enumerate(picture.series):
        point = series.points[0]
        if from_zero:
            (bar,) = axes.barh([position], [point.x], height=0.62, color=COLOURS[0], alpha=0.8)
            bar.set_gid(canvas.new_id(point.text))
        else:
            canvas.mark(point.x, position, point.text, "o", color=COLOURS[0], markersize=8)
        if point.x_sd:
            axes.errorbar(
                [point.x],
                [position],
                xerr=[point.x_sd],
                fmt="none",
                ecolor=MUTED if from_zero else COLOURS[0],
                capsize=4,
                linewidth=1.5,
            )
        for paper in series.paper:
            style = {"color": COLOURS[1], "markerfacecolor": "none", "markersize": 7}
            canvas.mark(paper.x, position, paper.text, "D", **style)
    axes.set_yticks(range(len(picture.series)), [series.name for series in picture.series])
    axes.set_ylim(len(picture.series) - 0.5, -0.5)
    if from_zero:
        axes.set_xlim(left=0)


KIND = PlotKind(
    name="bars",
    required_keys=("metric",),
    make=_make,
    draw=_draw,
    caption="Mean over seeds ± one standard deviation.",
    paper_caption=" Diamonds: the paper's figures.",
    metric_keys=("metric",),
    horizontal=True,
)
