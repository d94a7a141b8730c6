"""Make the numbers and the text of a scaling-law report: coefficients and predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from megatron_kd.sweep.scaling.compute import TrainingFlops, compare
from megatron_kd.sweep.scaling.fit import Estimate, Fit
from megatron_kd.sweep.scaling.laws import DistillationLaw, SupervisedLaw

# A law as fitted, or as published.
SupervisedResult = Fit[SupervisedLaw] | SupervisedLaw
DistillationResult = Fit[DistillationLaw] | DistillationLaw


@dataclass(frozen=True)
class ScalingQuery:
    """Hold the run that is predicted; None where a number was not given.

    Attributes:
        parameters: the student's, without embeddings.
        tokens: tokens of training.
        teacher_loss: the teacher's cross-entropy, nats per token.
        flops: what the FLOPs of the run depend on.
    """

    parameters: float | None = None
    tokens: float | None = None
    teacher_loss: float | None = None
    flops: TrainingFlops | None = None

    def as_dict(self, *, with_comparison: bool) -> dict[str, Any]:
        """Return plain numbers by name; those of `flops` have the key prices.

        Args:
            with_comparison: add the FLOPs of the distilled run, and the tokens of plain training
                for the same FLOPs.
        """
        numbers: dict[str, Any] = {
            "tokens": self.tokens,
            "teacher_loss": self.teacher_loss,
            "parameters": self.parameters,
        }
        if self.flops is None:
            return numbers
        numbers["prices"] = asdict(self.flops)
        if with_comparison and self.tokens is not None and self.teacher_loss is not None:
            numbers["flops"] = self.flops.distilled(self.tokens)
            numbers["equal_flops_tokens"] = self.flops.supervised_tokens(self.tokens)
        return numbers


def law_numbers(
    supervised: SupervisedResult, distilled: DistillationResult | None
) -> dict[str, Any]:
    """Return the coefficients of both laws as plain numbers, with their intervals."""
    numbers = {"supervised": _law_numbers(supervised)}
    if distilled is not None:
        numbers["distillation"] = _law_numbers(distilled)
    return numbers


def _law_numbers(result: SupervisedResult | DistillationResult) -> dict[str, Any]:
    if isinstance(result, Fit):
        return {
            "points": len(result.points),
            "residual_percent": float(100 * abs(result.residuals).mean()),
            "held": dict(result.held),
            "undetermined": result.undetermined(),
            "coefficients": {
                name: asdict(estimate) for name, estimate in result.coefficients().items()
            },
        }
    values = {name: value for name, value in asdict(result).items() if name != "supervised"}
    exact = {name: asdict(Estimate(value, value, value)) for name, value in values.items()}
    return {"points": 0, "coefficients": exact}


def predictions(
    supervised: SupervisedResult, distilled: DistillationResult | None, query: ScalingQuery
) -> dict[str, Any]:
    """Return the predicted losses of a run by name, with their intervals.

    Args:
        supervised: the law of plain runs.
        distilled: the law of distilled runs, or None.
        query: the run; without parameters and tokens there are no predictions.
    """
    n, d, t = query.parameters, query.tokens, query.teacher_loss
    if n is None or d is None:
        return {}
    estimates = {"alone, equal tokens": _estimate(supervised, lambda law: law.loss(n, d))}
    if distilled is None:
        return {name: asdict(estimate) for name, estimate in estimates.items()}

    def add(name: str, function: Callable[[Any], float]) -> None:
        estimates[name] = _estimate(distilled, function)

    add("the teacher's loss that is best for it", lambda law: law.best_teacher_loss(n, d))
    add("distilled by that teacher", lambda law: law.loss(n, d, law.best_teacher_loss(n, d)))
    if t is not None:
        add("distilled", lambda law: law.loss(n, d, t))
        add(
            "distilled - alone, equal tokens",
            lambda law: law.loss(n, d, t) - law.supervised.loss(n, d),
        )
    flops = query.flops
    if t is not None and flops is not None:
        add("alone, equal FLOPs", lambda law: compare(law, n, d, t, flops).equal_flops)
        add(
            "distilled - alone, equal FLOPs",
            lambda law: (
                compare(law, n, d, t, flops).distilled - compare(law, n, d, t, flops).equal_flops
            ),
        )
    return {name: asdict(estimate) for name, estimate in estimates.items()}


def _estimate(
    result: SupervisedResult | DistillationResult, function: Callable[[Any], float]
) -> Estimate:
    if isinstance(result, Fit):
        return result.estimate(function)
    value = float(function(result))
    return Estimate(value, value, value)


def report_text(report: dict[str, Any], level: float) -> str:
    """Return a report as text.

    Args:
        report: the keys query (`ScalingQuery.as_dict`), laws (`law_numbers`) and predictions.
        level: probability of the intervals.
    """
    query, lines = report["query"], []
    for name, law in report["laws"].items():
        lines += _law_lines(name, law, level)
    if report["predictions"]:
        teacher = ""
        if query["teacher_loss"] is not None:
            teacher = f", teacher at {query['teacher_loss']:g}"
        lines.append(
            f"{query['parameters']:.4g} parameters, {query['tokens']:.4g} tokens{teacher}; nats "
            "per token"
        )
        for name, estimate in report["predictions"].items():
            lines.append(f"  {name:40}{_interval_text(estimate, '.4f')}")
        if "flops" in query:
            lines.append(
                f"  {query['flops']:.3e} FLOPs distilled, for which it trains alone on "
                f"{query['equal_flops_tokens']:.4g} tokens"
            )
    return "\n".join(lines)


def _law_lines(name: str, law: dict[str, Any], level: float) -> list[str]:
    if not law["points"]:
        lines = [f"{name}: the published coefficients"]
    else:
        lines = [
            f"{name}: {law['points']} runs, missed by {law['residual_percent']:.2f} % on average; "
            f"intervals of {100 * level:g} %"
        ]
    for coefficient, estimate in law["coefficients"].items():
        is_undetermined = coefficient in law.get("undetermined", [])
        mark = "   not determined" if is_undetermined else ""
        lines.append(f"  {coefficient:8}{_interval_text(estimate)}{mark}")
    return lines


def _interval_text(estimate: dict[str, float], form: str = ".4g") -> str:
    text = f"{estimate['value']:>12{form}}"
    if estimate["low"] == estimate["high"]:
        return text
    return f"{text}   {estimate['low']:{form}} .. {estimate['high']:{form}}"
