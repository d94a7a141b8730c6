"""Draw the best layouts: memory of the rank that needs most, and the time of a step, by part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_kd.config import ConfigError
from megatron_kd.planning.hardware import GIB
from megatron_kd.planning.memory import PARTS
from megatron_kd.planning.reports.plan_text import PlanReport, layout_text, teacher_text
from megatron_kd.planning.step_time import STEP_PARTS

# Okabe and Ito's colours and lighter shades of them: related parts are alike, and neighbours differ
# in grey too.
_MEMORY_PALETTE = (
    *("#0072B2", "#56B4E9", "#A6D5F2", "#009E73", "#66C5A9", "#B5E3D5", "#F0E442"),
    *("#D55E00", "#EFA374", "#F6CDB3", "#CC79A7", "#E3B9D2", "#999999"),
)
_TIME_PALETTE = (
    *("#0072B2", "#F0E442", "#E69F00", "#BBBBBB", "#CC79A7", "#56B4E9", "#D55E00", "#EFA374"),
)
MEMORY_COLOURS = dict(zip(PARTS, _MEMORY_PALETTE, strict=True))
TIME_COLOURS = dict(zip(STEP_PARTS, _TIME_PALETTE, strict=True))


def draw_plan(report: PlanReport, path: Path, num_layouts: int) -> None:
    """Write the picture of a plan.

    Args:
        report: the plan.
        path: file to write; its suffix selects the format (.png, .svg, .pdf).
        num_layouts: number of layouts to draw.

    Raises:
        ConfigError: if matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--picture needs matplotlib: pip install 'megatron-kd[report]'") from None
    plans, ranks = report.result.plans[:num_layouts], report.cluster.ranks
    figure = Figure(figsize=(13, 2.6 + 0.55 * len(plans)), layout="constrained")
    memory, time = figure.subplots(1, 2, sharey=True)
    _draw_memory(memory, report, num_layouts)
    _draw_time(time, report, num_layouts)
    labels = [
        f"{number}  {layout_text(plan, ranks)}\nteacher: {teacher_text(plan, ranks)}"
        for number, plan in enumerate(plans, 1)
    ]
    memory.set_yticks(range(len(plans)), labels, fontsize=8)
    memory.invert_yaxis()
    figure.suptitle(report.title, fontsize=11, x=0.01, ha="left")
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--picture {path} cannot be written: {error}") from None


def _draw_memory(axes: Any, report: PlanReport, num_layouts: int) -> None:
    peaks = [plan.peak.parts for plan in report.result.plans[:num_layouts]]
    bars = [{name: size / GIB for name, size in parts.items()} for parts in peaks]
    _draw_bars(axes, bars, MEMORY_COLOURS)
    capacity = report.cluster.memory / GIB
    if capacity < float("inf"):
        axes.axvline(capacity, color="black", linestyle="--", linewidth=1)
        axes.set_xlim(0, capacity * 1.06)
    title = "Peak memory of the rank that needs most, GiB (dashed: capacity)"
    axes.set_title(title, fontsize=10, loc="left")


def _draw_time(axes: Any, report: PlanReport, num_layouts: int) -> None:
    times = [plan.time for plan in report.result.plans[:num_layouts]]
    _draw_bars(axes, [time.parts for time in times], TIME_COLOURS)
    for number, time in enumerate(times):
        label = f" {time.tokens_per_second:,.0f} tokens/s"
        axes.text(time.seconds, number, label, va="center", fontsize=8)
    axes.set_xlim(0, max(time.seconds for time in times) * 1.25)
    axes.set_title("Time of a step, seconds", fontsize=10, loc="left")


def _draw_bars(axes: Any, bars: list[dict[str, float]], colours: dict[str, str]) -> None:
    """Draw stacked bars; parts below a hundredth of a bar everywhere get no legend entry."""
    longest = max(sum(bar.values()) for bar in bars)
    starts = [0.0] * len(bars)
    for name, colour in colours.items():
        values = [bar.get(name, 0.0) for bar in bars]
        if not any(values):
            continue
        axes.barh(
            range(len(bars)),
            values,
            left=starts,
            color=colour,
            label=name if max(values) > longest / 100 else None,
            height=0.62,
            edgecolor="white",
            linewidth=0.6,
        )
        starts = [start + value for start, value in zip(starts, values, strict=True)]
    axes.legend(fontsize=8, ncols=4, loc="upper left", bbox_to_anchor=(0, -0.08), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
