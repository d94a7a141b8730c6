"""Draw a fitted scaling law: residuals, and a student's loss over tokens and over the teacher's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kd.config import ConfigError
from megatron_kd.sweep.scaling.fit import Fit
from megatron_kd.sweep.scaling.forms import Array
from megatron_kd.sweep.scaling.scaling_report import (
    DistillationResult,
    ScalingQuery,
    SupervisedResult,
)

BLUE, ORANGE = "#0072B2", "#D55E00"
# Drawn where neither a query nor points give a value: the middle of the published runs.
_PUBLISHED_MIDDLE = {"parameters": 1e9, "tokens": 1e11, "teacher_loss": 2.2}


@dataclass(frozen=True)
class _Results:
    """Hold the laws, and the run whose curves are drawn."""

    supervised: SupervisedResult
    distilled: DistillationResult | None
    parameters: float
    tokens: float
    teacher_loss: float


def draw_laws(
    supervised: SupervisedResult,
    distilled: DistillationResult | None,
    path: Path,
    query: ScalingQuery,
) -> None:
    """Write the picture of the laws.

    Args:
        supervised: the law of plain runs.
        distilled: the law of distilled runs, or None.
        path: file to write.
        query: the run whose curves are drawn; the middle of the points where a number is None.

    Raises:
        ConfigError: if matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--picture needs matplotlib: pip install 'megatron-kd[report]'") from None
    parameters, tokens, teacher_loss = (
        _value_or_middle((supervised, distilled), name, getattr(query, name))
        for name in ("parameters", "tokens", "teacher_loss")
    )
    results = _Results(supervised, distilled, parameters, tokens, teacher_loss)
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    panels = figure.subplots(1, 3)
    _draw_residuals(panels[0], results)
    _draw_over_tokens(panels[1], results)
    _draw_over_teacher_loss(panels[2], results)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--picture {path} cannot be written: {error}") from None


def _draw_residuals(axes: Any, results: _Results) -> None:
    series = ((results.supervised, BLUE, "alone"), (results.distilled, ORANGE, "distilled"))
    for fit, colour, label in series:
        if isinstance(fit, Fit):
            losses, errors = [point.loss for point in fit.points], 100 * fit.residuals
            axes.scatter(losses, errors, s=14, color=colour, alpha=0.7, label=label)
    axes.axhline(0, color="black", linewidth=0.8)
    title = "predicted - measured, percent of the loss"
    axes.set(title=title, xlabel="measured loss, nats per token")


def _draw_over_tokens(axes: Any, results: _Results) -> None:
    parameters, teacher_loss = results.parameters, results.teacher_loss
    tokens = np.geomspace(results.tokens / 30, results.tokens * 30, 60)
    _draw_band(
        axes, tokens, results.supervised, lambda law: law.loss(parameters, tokens), BLUE, "alone"
    )
    if results.distilled is not None:
        _draw_band(
            axes,
            tokens,
            results.distilled,
            lambda law: law.loss(parameters, tokens, teacher_loss),
            ORANGE,
            f"teacher at {teacher_loss:.3f}",
        )
    title = f"{parameters:.3g} parameters"
    axes.set(title=title, xlabel="tokens", ylabel="nats per token", xscale="log")


def _draw_over_teacher_loss(axes: Any, results: _Results) -> None:
    parameters, tokens = results.parameters, results.tokens
    title = f"{parameters:.3g} parameters, {tokens:.3g} tokens"
    axes.set(title=title, xlabel="the teacher's loss")
    if results.distilled is None:
        return
    law = _law_of(results.supervised)
    alone = float(law.loss(parameters, tokens))
    losses = np.linspace(max(0.6 * alone, 0.98 * law.E), 1.25 * alone, 80)
    _draw_band(
        axes,
        losses,
        results.distilled,
        lambda law: law.loss(parameters, tokens, losses),
        ORANGE,
        "distilled",
    )
    axes.axhline(alone, color=BLUE, linewidth=1.2, label="alone")
    axes.plot(
        losses, losses, color="grey", linewidth=0.8, linestyle=":", label="the teacher itself"
    )
    lowest = _law_of(results.distilled).loss(parameters, tokens, losses).min()
    axes.set_ylim(0.95 * lowest, 1.1 * alone)


def _law_of(result: Any) -> Any:
    return result.law if isinstance(result, Fit) else result


def _value_or_middle(results: tuple[Any, ...], name: str, value: float | None) -> float:
    """Return the value, else the geometric mean of the points, else that of published runs."""
    if value is not None:
        return value
    points = [point for fit in results if isinstance(fit, Fit) for point in fit.points]
    numbers = [getattr(point, name) for point in points]
    logarithms = np.log([number for number in numbers if number is not None])
    return float(np.exp(logarithms.mean())) if len(logarithms) else _PUBLISHED_MIDDLE[name]


def _draw_band(  # noqa: PLR0913 - one curve: where, what and how
    axes: Any, x: Array, result: Any, function: Callable[[Any], Array], colour: str, label: str
) -> None:
    """Draw a function of a law, with the interval of a fit."""
    axes.plot(x, function(_law_of(result)), color=colour, linewidth=1.6, label=label)
    if isinstance(result, Fit):
        curves = [function(law) for law in result.resampled]
        low, high = np.quantile(curves, result.quantiles, axis=0)
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
