"""The best layouts as a picture: memory of the fullest rank by part, and where a step's time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_kd.config import ConfigError
from megatron_kd.planning.hardware import GIB
from megatron_kd.planning.memory import PARTS
from megatron_kd.planning.report import Report, layout_text, teacher_text
from megatron_kd.planning.step_time import STEP_PARTS

# Okabe and Ito's colours and lighter ones of them: what belongs together is alike, neighbours differ in grey too.
MEMORY_COLOURS = dict(
    zip(
        PARTS,
        (
            "#0072B2",
            "#56B4E9",
            "#A6D5F2",
            "#009E73",
            "#66C5A9",
            "#B5E3D5",
            "#F0E442",
            "#D55E00",
            "#EFA374",
            "#CC79A7",
            "#E3B9D2",
            "#999999",
        ),
        strict=True,
    )
)
TIME_COLOURS = dict(
    zip(
        STEP_PARTS,
        ("#0072B2", "#F0E442", "#E69F00", "#BBBBBB", "#CC79A7", "#56B4E9", "#D55E00", "#EFA374"),
        strict=True,
    )
)


def draw(report: Report, path: Path, show: int) -> None:
    """Write the picture. ConfigError without matplotlib, or where the file cannot be written."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--picture needs matplotlib: pip install 'megatron-kd[report]'") from None
    plans, ranks = report.found.plans[:show], report.cluster.ranks
    figure = Figure(figsize=(13, 2.6 + 0.55 * len(plans)), layout="constrained")
    memory, time = figure.subplots(1, 2, sharey=True)
    labels = [
        f"{number}  {layout_text(plan, ranks)}\nteacher: {teacher_text(plan, ranks)}"
        for number, plan in enumerate(plans, 1)
    ]
    _bars(
        memory,
        [{name: size / GIB for name, size in plan.fullest.parts.items()} for plan in plans],
        MEMORY_COLOURS,
    )
    if report.cluster.memory < float("inf"):
        memory.axvline(report.cluster.memory / GIB, color="black", linestyle="--", linewidth=1)
        memory.set_xlim(0, report.cluster.memory / GIB * 1.06)
    memory.set_title(
        "Memory of the fullest rank, GiB (dashed: what it has)", fontsize=10, loc="left"
    )
    _bars(time, [plan.time.parts for plan in plans], TIME_COLOURS)
    for row, plan in enumerate(plans):
        time.text(
            plan.time.seconds,
            row,
            f" {plan.time.tokens_per_second:,.0f} tokens/s",
            va="center",
            fontsize=8,
        )
    time.set_xlim(0, max(plan.time.seconds for plan in plans) * 1.25)
    time.set_title("Time of a step, seconds", fontsize=10, loc="left")
    memory.set_yticks(range(len(plans)), labels, fontsize=8)
    memory.invert_yaxis()
    figure.suptitle(report.title, fontsize=11, x=0.01, ha="left")
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--picture {path} cannot be written: {error}") from None


def _bars(axes: Any, rows: list[dict[str, float]], colours: dict[str, str]) -> None:
    """One stacked bar a row; parts that are nowhere a hundredth of a bar are drawn without a name in the legend."""
    whole = max(sum(row.values()) for row in rows)
    left = [0.0] * len(rows)
    for name, colour in colours.items():
        values = [row.get(name, 0.0) for row in rows]
        if not any(values):
            continue
        label = name if max(values) > whole / 100 else None
        axes.barh(
            range(len(rows)),
            values,
            left=left,
            color=colour,
            label=label,
            height=0.62,
            edgecolor="white",
            linewidth=0.6,
        )
        left = [start + value for start, value in zip(left, values, strict=True)]
    axes.legend(fontsize=8, ncols=4, loc="upper left", bbox_to_anchor=(0, -0.08), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
