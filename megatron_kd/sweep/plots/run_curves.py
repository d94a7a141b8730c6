"""Draw the cross-entropy curves of single runs over their training tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_kd.sweep.plots.canvas import GRID, MUTED, colour_of, marker_of
from megatron_kd.sweep.results.run_results import ReportError, RunCurves, Values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TOKEN_UNITS = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))


def draw_runs(runs: Sequence[RunCurves], output: Path) -> None:
    """Write a picture of the cross-entropy over tokens.

    Lines are the smoothed training loss, points the validation losses. The ending of the file
    chooses the format.

    Raises:
        ReportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise ReportError(
            "The picture needs matplotlib: pip install 'megatron-kd[report]'."
        ) from None
    # A Figure made without pyplot draws with Agg and needs no display.
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(12, 5), dpi=100, layout=layout)
    axes = figure.add_subplot()
    scale, unit = _token_unit(max(float(run.tokens.max()) for run in runs))
    splits = list(dict.fromkeys(name for run in runs for name in run.splits))
    highest, lowest = [], []
    for number, run in enumerate(runs):
        smooth = _draw_run(axes, run, colour_of(number), splits, scale)
        if smooth.size:
            # The first steps fall from ln(vocabulary): at their scale later ones are invisible.
            highest.append(smooth[smooth.size // 12 :].max())
            lowest.append(smooth.min())
        lowest += [
            float(np.nanmin(split.ce))
            for split in run.splits.values()
            if np.isfinite(split.ce).any()
        ]
    if highest:
        margin = 0.06 * max(max(highest) - min(lowest), 1e-3)
        axes.set_ylim(min(lowest) - margin, max(highest) + margin)
    _style(axes, unit)
    _legend(figure, runs, splits)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def running_mean(values: Values, window: int) -> Values:
    """Return the mean over `window` values around each value, so that the curve does not lag.

    Args:
        values: Values, [n].
        window: Number of values; fewer at both ends.

    Returns:
        Means, [n].
    """
    sums = np.append(0.0, np.cumsum(values))
    index = np.arange(values.size)
    first = np.maximum(index - window // 2, 0)
    last = np.minimum(index + window // 2 + 1, values.size)
    means: Values = (sums[last] - sums[first]) / (last - first)
    return means


def _draw_run(
    axes: Axes, run: RunCurves, colour: str, splits: Sequence[str], scale: float
) -> Values:
    """Draw one run; return its smoothed training loss without values that are not finite."""
    finite = np.isfinite(run.ce)
    tokens, ce = run.tokens[finite] / scale, run.ce[finite]
    smooth = running_mean(ce, max(1, ce.size // 50))
    axes.plot(tokens, ce, color=colour, alpha=0.15, linewidth=0.8, zorder=1)
    axes.plot(tokens, smooth, color=colour, linewidth=1.8, zorder=2)
    for name, split in run.splits.items():
        axes.plot(
            split.tokens / scale,
            split.ce,
            ":",
            marker=marker_of(splits.index(name)),
            color=colour,
            markersize=7,
            markeredgecolor="white",
            linewidth=1,
            zorder=3,
        )
    return smooth


def _legend(figure: Figure, runs: Sequence[RunCurves], splits: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour_of(number), linewidth=4, label=run.label)
        for number, run in enumerate(runs)
    ]
    handles.append(Line2D([], [], color=MUTED, linewidth=1.8, label="training, running mean"))
    handles += [
        Line2D(
            [],
            [],
            color=MUTED,
            marker=marker_of(number),
            linestyle=":",
            markersize=7,
            label=f"validation: {name}",
        )
        for number, name in enumerate(splits)
    ]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)


def _style(axes: Axes, unit: str) -> None:
    axes.set_xlim(left=0)
    axes.set_title("Next-token cross-entropy", loc="left", fontsize=13, pad=10)
    axes.set_xlabel(f"training tokens ({unit})", fontsize=11)
    axes.set_ylabel("cross-entropy (nats per token)", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def _token_unit(largest: float) -> tuple[float, str]:
    return next((unit for unit in _TOKEN_UNITS if largest >= unit[0]), (1.0, "count"))
