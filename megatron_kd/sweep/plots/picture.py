"""Hold the content of plots, points with their spread by series, and define kinds of plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_kd.sweep.plots.canvas import Canvas
from megatron_kd.sweep.results.sweep_results import CellResult, SeedValues, SweepResult
from megatron_kd.sweep.results.tables import heading


@dataclass(frozen=True)
class PlotPoint:
    """Hold a point, its standard deviations (0 without one), and its tooltip."""

    x: float
    y: float
    x_sd: float = 0.0
    y_sd: float = 0.0
    text: str = ""


@dataclass(frozen=True)
class PlotSeries:
    """Hold the points of one name, and the source's figures, which have markers of their own."""

    name: str
    points: tuple[PlotPoint, ...]
    paper: tuple[PlotPoint, ...] = ()


@dataclass(frozen=True)
class Picture:
    """Hold the content of one plot.

    Attributes:
        kind: Name of the kind of plot.
        x_names: Labels of the positions 0, 1, ... of an axis without numbers.
        notes: Which seeds are missing.
    """

    kind: str
    title: str
    x_label: str
    y_label: str
    series: tuple[PlotSeries, ...]
    x_names: tuple[str, ...] = ()
    log_x: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlotKind:
    """Define a kind of plot. Each module of plots/kinds/ has one, named KIND.

    Attributes:
        name: The `kind` of a [[plot]].
        required_keys: Keys of [[plot]] that the kind needs.
        make: Computes the picture from the results, a [[plot]] and its cells.
        draw: Draws the series of a picture.
        caption: Text below the picture on a page.
        metric_keys: Keys of [[plot]] that name metrics.
        x_choices: Values that the key `x` may have, if not any.
        horizontal: One line for each series, without a legend and a y label.
        has_markers: Points have markers in the legend.
        joins_points: Series have lines in the legend even if each has one point.
        ticks_at_points: A logarithmic x axis has its ticks at the points.
        describes_last_point_only: The description for screen readers has only the last points.
        paper_caption: Added to the caption if the picture has the source's figures.
    """

    name: str
    required_keys: tuple[str, ...]
    make: Callable[[SweepResult, Mapping[str, Any], Sequence[CellResult]], Picture]
    draw: Callable[[Canvas, Picture], None]
    caption: str = "Means over seeds; bars are one standard deviation."
    metric_keys: tuple[str, ...] = ()
    x_choices: tuple[str, ...] = ()
    horizontal: bool = False
    has_markers: bool = True
    joins_points: bool = True
    ticks_at_points: bool = False
    describes_last_point_only: bool = False
    paper_caption: str = ""


def format_number(value: float) -> str:
    """Format with five digits and without trailing zeros."""
    return f"{value:.5g}"


def count_seeds(count: int) -> str:
    """Format a number of seeds."""
    return f"{count} seed{'s' * (count != 1)}"


def sample_text(name: str, x: str, sample: SeedValues) -> str:
    """Format the tooltip of a mean over seeds.

    Args:
        name: Name of the series.
        x: Text before the mean, such as the position on the x axis.
        sample: Values by seed, at least one.
    """
    spread = "" if sample.sd is None else f" ± {format_number(sample.sd)}"
    mean = format_number(sample.mean or 0.0)
    return f"{name}: {x}{mean}{spread}, {count_seeds(sample.n)}"


def axis_label(result: SweepResult, name: str) -> str:
    """Return the label of an axis that shows a metric: name (unit)."""
    return next((heading(metric) for metric in result.metrics if metric["name"] == name), name)


def missing_seeds(
    result: SweepResult, cells: Sequence[CellResult], counts: Mapping[str, int]
) -> tuple[str, ...]:
    """Return a note for every cell with fewer seeds than it should have.

    Args:
        result: The results of the sweep.
        cells: Cells of the plot.
        counts: Number of seeds that the plot shows, by the name of the cell.
    """
    return tuple(
        f"{cell.name}: {counts.get(cell.name, 0)} of {result.seeds} seeds"
        for cell in cells
        if counts.get(cell.name, 0) < result.seeds
    )
