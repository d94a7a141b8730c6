"""Draw marks on matplotlib axes, with the colours and styles of all plots, and keep tooltips."""

from __future__ import annotations

from typing import Any, Literal

# Okabe and Ito's colours: distinct for colour-blind readers and in grey print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#b8a800")
MARKERS = ("o", "s", "^", "D", "v", "P")
GRID, MUTED = "#dddddd", "#777777"
LineStyle = Literal["-", "--", ":", "-.", ""]
_LINE_STYLES: tuple[LineStyle, ...] = ("-", "--", ":", "-.")


class Canvas:
    """Hold the axes of a plot, and the tooltips of its marks by their ids."""

    def __init__(self, axes: Any) -> None:
        self.axes = axes
        self.tooltips: dict[str, str] = {}

    def new_id(self, tooltip: str) -> str:
        """Return the id for a new mark with this tooltip."""
        mark = f"p{len(self.tooltips)}"
        self.tooltips[mark] = tooltip
        return mark

    def mark(self, x: float, y: float, tooltip: str, marker: str, **style: Any) -> None:
        """Draw a marker.

        Args:
            x: Position.
            y: Position.
            tooltip: Text that a page shows for the marker.
            marker: Marker of matplotlib.
            style: Further arguments of `Axes.plot`.
        """
        self.axes.plot([x], [y], marker, gid=self.new_id(tooltip), **style)


def colour_of(number: int) -> str:
    """Return the colour of a series by its number."""
    return COLOURS[number % len(COLOURS)]


def marker_of(number: int) -> str:
    """Return the marker of a series by its number."""
    return MARKERS[number % len(MARKERS)]


def line_style_of(number: int) -> LineStyle:
    """Return the line style of a series; series whose colour repeats are dashed."""
    return _LINE_STYLES[number // len(COLOURS) % len(_LINE_STYLES)]
