"""A fitted scaling law as a picture: what it misses of each run, and a student's loss over tokens and over the teacher's loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kd.config import ConfigError
from megatron_kd.sweep.scaling.forms import Array
from megatron_kd.sweep.scaling.law import DistillationLaw, Fit, SupervisedLaw

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"


def draw(
    supervised: Fit[SupervisedLaw] | SupervisedLaw,
    distilled: Fit[DistillationLaw] | DistillationLaw | None,
    path: Path,
    query: dict[str, Any],
) -> None:
    """Write the picture. query: parameters, tokens, teacher_loss, each possibly None: the middle of the points then.

    ConfigError without matplotlib, or where the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--picture needs matplotlib: pip install 'megatron-kd[report]'") from None
    parameters, tokens, teacher = (
        _or_middle(supervised, distilled, name, query[name])
        for name in ("parameters", "tokens", "teacher_loss")
    )
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    missed, over_tokens, over_teacher = figure.subplots(1, 3)
    for fit, colour, label in ((supervised, BLUE, "alone"), (distilled, ORANGE, "distilled")):
        if isinstance(fit, Fit):
            missed.scatter(
                [point.loss for point in fit.points],
                100 * fit.residuals,
                s=14,
                color=colour,
                alpha=0.7,
                label=label,
            )
    missed.axhline(0, color="black", linewidth=0.8)
    missed.set(
        title="predicted - measured, percent of the loss", xlabel="measured loss, nats per token"
    )
    grid = np.geomspace(tokens / 30, tokens * 30, 60)
    _band(over_tokens, grid, supervised, lambda law: law.loss(parameters, grid), BLUE, "alone")
    if distilled is not None:
        _band(
            over_tokens,
            grid,
            distilled,
            lambda law: law.loss(parameters, grid, teacher),
            ORANGE,
            f"teacher at {teacher:.3f}",
        )
        own = float(_law(supervised).loss(parameters, tokens))
        losses = np.linspace(max(0.6 * own, 0.98 * _law(supervised).E), 1.25 * own, 80)
        _band(
            over_teacher,
            losses,
            distilled,
            lambda law: law.loss(parameters, tokens, losses),
            ORANGE,
            "distilled",
        )
        over_teacher.axhline(own, color=BLUE, linewidth=1.2, label="alone")
        over_teacher.plot(
            losses, losses, color="grey", linewidth=0.8, linestyle=":", label="the teacher itself"
        )
        over_teacher.set_ylim(
            0.95 * _law(distilled).loss(parameters, tokens, losses).min(), 1.1 * own
        )
    over_tokens.set(
        title=f"{parameters:.3g} parameters", xlabel="tokens", ylabel="nats per token", xscale="log"
    )
    over_teacher.set(
        title=f"{parameters:.3g} parameters, {tokens:.3g} tokens", xlabel="the teacher's loss"
    )
    for axes in (missed, over_tokens, over_teacher):
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--picture {path} cannot be written: {error}") from None


def _law(fit: Any) -> Any:
    return fit.law if isinstance(fit, Fit) else fit


def _or_middle(supervised: Any, distilled: Any, name: str, given: float | None) -> float:
    """What was asked for, or the geometric middle of the points, or a middle of the published runs."""
    if given is not None:
        return given
    points = [
        point for fit in (supervised, distilled) if isinstance(fit, Fit) for point in fit.points
    ]
    values = [value for value in (getattr(point, name) for point in points) if value is not None]
    return (
        float(np.exp(np.mean(np.log(values))))
        if values
        else {"parameters": 1e9, "tokens": 1e11, "teacher_loss": 2.2}[name]
    )


def _band(
    axes: Any, x: Array, fit: Any, function: Callable[[Any], Array], colour: str, label: str
) -> None:
    axes.plot(x, function(_law(fit)), color=colour, linewidth=1.6, label=label)
    if isinstance(fit, Fit):
        low, high = np.quantile([function(law) for law in fit.draws], fit.quantiles, axis=0)
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
