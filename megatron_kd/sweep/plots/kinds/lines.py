"""Plot a metric over a value that varies, one line for each value of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    format_number,
    missing_seeds,
    sample_text,
)
from megatron_kd.sweep.results.sweep_results import CellResult, SweepResult


def _make(result: SweepResult, plot: Mapping[str, Any], cells: Sequence[CellResult]) -> Picture:
    name, x_name = plot["metric"], plot["x"]
    cells = [cell for cell in cells if x_name in cell.values]
    positions, has_numbers = _positions([cell.values[x_name] for cell in cells])
    points: dict[str, list[PlotPoint]] = {}
    papers: dict[str, list[PlotPoint]] = {}
    for cell in cells:
        sample, text = cell.samples[name], as_text(cell.values[x_name])
        if sample.mean is None or text not in positions:
            continue
        line, x = _line_name(result, plot, cell), positions[text]
        tooltip = sample_text(line, f"at {x_name} {text}: ", sample)
        point = PlotPoint(x, sample.mean, y_sd=sample.sd or 0.0, text=tooltip)
        points.setdefault(line, []).append(point)
        if name in cell.paper:
            figure = cell.paper[name]
            tooltip = f"{line}, paper: {format_number(figure)} at {x_name} {text}"
            papers.setdefault(line, []).append(PlotPoint(x, figure, text=tooltip))
    series = [
        PlotSeries(line, _sorted(members), _sorted(papers.get(line, ())))
        for line, members in points.items()
    ]
    counts = {cell.name: cell.samples[name].n for cell in cells}
    return Picture(
        "lines",
        plot["title"],
        x_name,
        axis_label(result, name),
        tuple(series),
        () if has_numbers else tuple(positions),
        plot["log_x"],
        missing_seeds(result, cells, counts),
    )


def _positions(values: Sequence[Any]) -> tuple[dict[str, float], bool]:
    """Return positions on the x axis by the text of the value, and True if they are numbers."""
    distinct = list(dict.fromkeys(value for value in values if not isinstance(value, list | dict)))
    has_numbers = all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in distinct
    )
    positions = {
        as_text(value): float(value) if has_numbers else float(index)
        for index, value in enumerate(distinct)
    }
    return positions, has_numbers


def _line_name(result: SweepResult, plot: Mapping[str, Any], cell: CellResult) -> str:
    by = plot["by"]
    if by is not None and by in cell.values:
        return f"{by} = {as_text(cell.values[by])}"
    return cell.group or str(result.content["title"])


def _sorted(points: Sequence[PlotPoint]) -> tuple[PlotPoint, ...]:
    return tuple(sorted(points, key=lambda point: point.x))


def _draw(canvas: Canvas, picture: Picture) -> None:
    for number, series in enumerate(picture.series):
        draw_line(canvas, series, number, line_style_of(number))
        draw_points(canvas, series, number)


KIND = PlotKind(
    name="lines",
    required_keys=("metric", "x"),
    make=_make,
    draw=_draw,
    metric_keys=("metric",),
    ticks_at_points=True,
)
