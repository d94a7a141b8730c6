"""Declare the metrics of a run, and reduce those that a step measures to numbers.

Metrics of single tokens are declared in losses/token_metrics.py and taken from there.

A mean of means is wrong as soon as two microbatches hold different numbers of unmasked tokens. So
every microbatch reports a sum and a count, both are added over microbatches and ranks, and the
division happens once.

The last pipeline stage reports what the head measures, and every tensor-parallel rank of it makes
the same reports: exactly one of them may contribute. Hidden states are reported on the stage of
their layer. A contribution to a mean that is made elsewhere comes with count 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_kd.losses.token_metrics import TOKEN_METRICS

# Metric name -> fp32 or fp64 [2] = (sum, count).
MetricSums = Mapping[str, Tensor]

Reduction = Literal["mean", "sum", "value", "interval", "median", "max"]

REDUCTIONS: dict[Reduction, str] = {
    "mean": "mean over the counted tokens of the step",
    "sum": "sum over the tokens of the step",
    "value": "value after the step",
    "interval": "rate since the last log line",
    "median": "median over ranks",
    "max": "largest over ranks",
}


@dataclass(frozen=True)
class Metric:
    """Declare one metric.

    Attributes:
        name: key in metrics.jsonl and tag in TensorBoard.
        unit: unit of the value, or its range; empty for a plain number.
        reduction: how one number is made of tokens, ranks or time.
        description: meaning in one line.
    """

    name: str
    unit: str
    reduction: Reduction
    description: str


_NATS = "nats per token"
_SHARE = "in [0, 1]"

# Every step reports these with a sum and a count. The order is the layout of the packed tensor, so
# it is the same on every rank. The count of total_loss is the number of unmasked tokens.
_REPORTED = (
    Metric("total_loss", _NATS, "mean", "what the step minimises"),
    Metric("ce_loss", _NATS, "mean", "next-token cross-entropy"),
    Metric("kd_loss", _NATS, "mean", "distillation loss"),
    Metric(
        "routed_share",
        _SHARE,
        "mean",
        "tokens that distill.routing or distill.adaptive.keep leave to their labels",
    ),
    Metric("teacher_temperature", "", "mean", "temperature of the teacher under distill.adaptive"),
    Metric(
        "hidden_loss",
        _NATS,
        "mean",
        "what distill.hidden_states adds to total_loss: the sum over its entries of weight * loss",
    ),
    *(Metric(metric.name, metric.unit, "mean", metric.description) for metric in TOKEN_METRICS),
)
# Metrics that `reduce_reports` returns.
STEP_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        *_REPORTED,
        Metric("loss_tokens", "tokens", "sum", "unmasked tokens: the count of total_loss"),
    )
}
# Metrics that the training loop adds to a log line.
_LOOP_METRICS = (
    Metric("grad_norm", "", "value", "norm of the gradient before clipping"),
    Metric("learning_rate", "", "value", "learning rate of the step"),
    Metric("alpha", _SHARE, "value", "weight of kd_loss in total_loss"),
    Metric("tokens", "tokens", "value", "tokens trained on so far, masked ones included"),
    Metric("samples", "samples", "value", "samples trained on so far"),
    Metric("nonfinite_steps", "steps", "value", "steps so far whose update was skipped"),
    Metric("tokens_per_second", "tokens/s", "interval", "training speed over all ranks"),
    Metric("tflops_per_device", "1e12 FLOP/s", "interval", "model FLOP/s of one device"),
    Metric("mfu", _SHARE, "interval", "tflops_per_device over the peak of the device"),
    Metric("rank_seconds", "s", "median", "time of the last step on a rank"),
    Metric("slowest_rank_seconds", "s", "max", "time of the last step on the slowest rank"),
    Metric("slowest_rank", "rank", "value", "rank whose last step took longest"),
    Metric("data_seconds", "s", "max", "time of the last step spent waiting for data"),
)
# All metrics by name, in the order of the documentation.
METRICS: dict[str, Metric] = STEP_METRICS | {metric.name: metric for metric in _LOOP_METRICS}


def metrics_reference() -> str:
    """Return a Markdown table of all metrics, for the documentation."""
    lines = ["| Metric | Unit | Reduction | Description |", "|---|---|---|---|"]
    for metric in METRICS.values():
        cells = (metric.unit, REDUCTIONS[metric.reduction], metric.description)
        escaped = " | ".join(cell.replace("|", "\\|") for cell in cells)
        lines.append(f"| `{metric.name}` | {escaped} |")
    return "\n".join(lines)


def reduce_reports(
    reports: Sequence[MetricSums],
    *,
    contribute: bool,
    group: ProcessGroup | None,
    device: torch.device | str,
) -> dict[str, float | None]:
    """Reduce the reports of one step over microbatches and ranks.

    Args:
        reports: one report per microbatch of this rank (may be empty). Not modified. A metric may
            be missing from some or all of them.
        contribute: this rank's reports count. Other ranks add zeros, whatever they hold.
        group: every rank that needs the numbers, normally all of them. None: a single process, no
            collective (unlike torch.distributed, where None is the world).
        device: where the packed tensor lives: the device of the backend of `group`.

    Returns:
        Every name of STEP_METRICS, in order, equal on every rank of `group`. A mean whose count is
        0 is None.

    Raises:
        ValueError: if a contributing rank reports an unknown metric or a tensor that is not [2]
            fp32 or fp64. A flag travels with the sums, so every rank of the group raises and none
            waits.

    Collectives:
        One all_reduce (SUM) of fp64 [len(STEP_METRICS), 2] over `group`, and one host sync.
    """
    problem = _report_problem(reports) if contribute else None
    packed = _pack(reports if contribute and problem is None else (), device)
    packed[-1, 0] = float(problem is not None)
    if group is not None:
        torch.distributed.all_reduce(packed, op=torch.distributed.ReduceOp.SUM, group=group)
    *pairs, (num_problems, _) = packed.tolist()
    if num_problems:
        raise ValueError(
            problem
            or f"{int(num_problems)} other rank(s) made a report that cannot be reduced; their "
            "message says why"
        )
    values: dict[str, float | None] = {
        metric.name: total / count if count > 0 else None
        for metric, (total, count) in zip(_REPORTED, pairs, strict=True)
    }
    return values | {"loss_tokens": pairs[0][1]}


def _report_problem(reports: Sequence[MetricSums]) -> str | None:
    names = {metric.name for metric in _REPORTED}
    for report in reports:
        for name, value in report.items():
            if name not in names:
                return f"unknown metric {name!r} in a report; known: {', '.join(sorted(names))}"
            if value.shape != (2,) or value.dtype not in (torch.float32, torch.float64):
                return (
                    f"metric {name!r} must be a tensor [2] = (sum, count), fp32 or fp64, not "
                    f"{list(value.shape)} {value.dtype}"
                )
    return None


def _pack(reports: Sequence[MetricSums], device: torch.device | str) -> Tensor:
    """Return fp64 [len(_REPORTED) + 1, 2]: sum and count of each metric, and zeros for a flag."""
    packed = torch.zeros(len(_REPORTED) + 1, 2, dtype=torch.float64, device=device)
    for number, metric in enumerate(_REPORTED):
        sums = [
            report[metric.name].detach().to(packed) for report in reports if metric.name in report
        ]
        if sums:
            packed[number] = torch.stack(sums).sum(dim=0)
    return packed
