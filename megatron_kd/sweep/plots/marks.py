"""Draw the points of a series with error bars and the source's figures."""

from __future__ import annotations

from megatron_kd.sweep.plots.canvas import Canvas, colour_of, marker_of
from megatron_kd.sweep.plots.picture import PlotSeries


def draw_line(canvas: Canvas, series: PlotSeries, number: int, line_style: str) -> None:
    """Connect the points of a series.

    Args:
        canvas: The canvas.
        series: The series.
        number: Position of the series in the picture; decides the colour.
        line_style: Line style of matplotlib.
    """
    xs, ys = [point.x for point in series.points], [point.y for point in series.points]
    canvas.axes.plot(xs, ys, line_style, color=colour_of(number), linewidth=1.5)


def draw_points(canvas: Canvas, series: PlotSeries, number: int) -> None:
    """Draw the markers of a series.

    Args:
        canvas: The canvas.
        series: The series.
        number: Position of the series in the picture; decides colour and marker.
    """
    colour = colour_of(number)
    for point in series.points:
        canvas.axes.errorbar(
            [point.x],
            [point.y],
            xerr=[point.x_sd] if point.x_sd else None,
            yerr=[point.y_sd] if point.y_sd else None,
            fmt="none",
            ecolor=colour,
            capsize=3,
            linewidth=1.2,
        )
        canvas.mark(point.x, point.y, point.text, marker_of(number), color=colour, markersize=7)
    for paper in series.paper:
        style = {"color": colour, "markerfacecolor": "none", "markersize": 8}
        canvas.mark(paper.x, paper.y, paper.text, "D", **style)
