"""What a step measures, as (sum, count) pairs, and the one collective that turns them into numbers.

Averages of averages are wrong as soon as two microbatches hold different numbers of unmasked tokens. So every
microbatch reports a sum and a count, both are added over microbatches and ranks, and the division happens once.

A report is a `dict[str, Tensor]`: metric name -> 1-D fp64 or fp32 tensor [2] = (sum, count). The last pipeline stage reports what
the head measures, and every tensor-parallel rank of it makes the same reports: exactly one of them may contribute. Hidden states are
reported where their layer is. A part of a mean that is made elsewhere comes with count 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

Report = Mapping[str, Tensor]


class Metric(NamedTuple):
    """One measured quantity: its name, how sums and counts become a number, and its meaning with unit."""

    name: str
    reduction: Literal["mean", "sum"]
    description: str


# The order is the layout of the packed tensor, so it must be the same on every rank. total_loss is first: its count
# is the number of unmasked tokens.
METRICS: tuple[Metric, ...] = (
    Metric("total_loss", "mean", "what the step minimises, nats per token"),
    Metric("ce_loss", "mean", "next-token cross-entropy, nats per token"),
    Metric("kd_loss", "mean", "distillation loss, nats per token"),
    Metric(
        "routed_share",
        "mean",
        "tokens that distill.routing or distill.adaptive.keep leave to their labels, in [0, 1]",
    ),
    Metric("teacher_temperature", "mean", "temperature of the teacher under distill.adaptive"),
    Metric(
        "hidden_loss",
        "mean",
        "what distill.hidden_states adds to total_loss: the sum over its entries of weight * loss",
    ),
    Metric("teacher_mass", "mean", "teacher probability of the kept entries, in [0, 1]"),
    Metric("teacher_entropy", "mean", "entropy of the teacher over the full vocabulary, nats"),
    Metric("student_entropy", "mean", "entropy of the student over the full vocabulary, nats"),
    Metric(
        "top1_agreement",
        "mean",
        "share of tokens where teacher and student rank the same id first, in [0, 1]",
    ),
    Metric(
        "kl",
        "mean",
        "sum_k p_T(k) * (log p_T(k) - log p_S(k)) at temperature 1, kept entries + one tail bucket, nats",
    ),
    Metric(
        "tokens",
        "sum",
        "unmasked tokens of the step; taken from the count of total_loss, never reported",
    ),
)
_REPORTED = frozenset(metric.name for metric in METRICS if metric.name != "tokens")


def reduce_reports(
    reports: Sequence[Report],
    *,
    contribute: bool,
    group: ProcessGroup | None,
    device: torch.device | str,
) -> dict[str, float | None]:
    """Reduce the reports of one step over microbatches and ranks.

    Args:
        reports: one report per microbatch of this rank (may be empty). Not modified. A metric may be missing from
            some or all of them.
        contribute: whether this rank's reports count. Other ranks add zeros, whatever they hold.
        group: every rank that wants the numbers, normally all of them. None: a single process, no collective
            (unlike torch.distributed, where None is the world).
        device: where the packed tensor lives: the device of the backend of `group`.
    Returns:
        Every name of METRICS, in order, equal on every rank of `group`. A mean whose count is 0 is None.
        "tokens" is the number of unmasked tokens of this step.
    Raises:
        ValueError: an unknown metric or a tensor that is not [2] fp32 or fp64, on any contributing rank. A flag
            travels with the sums, so every rank of the group raises and none is left waiting.
    Collectives: exactly one all_reduce (SUM) of fp64 [len(METRICS) + 1, 2] over `group`, and one host sync.
    """
    problem = _problem(reports) if contribute else None
    packed = _pack(reports if contribute and problem is None else (), device)
    packed[-1, 0] = float(problem is not None)
    if group is not None:
        torch.distributed.all_reduce(packed, op=torch.distributed.ReduceOp.SUM, group=group)
    *rows, (num_problems, _) = packed.tolist()
    if num_problems:
        raise ValueError(
            problem
            or f"{int(num_problems)} other rank(s) made a report that cannot be reduced; their message says why"
        )
    return {metric.name: _finish(metric, *row) for metric, row in zip(METRICS, rows, strict=True)}


def _problem(reports: Sequence[Report]) -> str | None:
    for report in reports:
        for name, value in report.items():
            if name not in _REPORTED:
                return f"unknown metric {name!r} in a report; known: {', '.join(sorted(_REPORTED))}"
            if value.shape != (2,) or value.dtype not in (torch.float32, torch.float64):
                return f"metric {name!r} must be a tensor [2] = (sum, count), fp32 or fp64, not {list(value.shape)} {value.dtype}"
    return None


def _pack(reports: Sequence[Report], device: torch.device | str) -> Tensor:
    """fp64 [len(METRICS) + 1, 2]: (sum, count) of each metric over the microbatches; the last row is free for a flag."""
    packed = torch.zeros(len(METRICS) + 1, 2, dtype=torch.float64, device=device)
    for row, metric in enumerate(METRICS):
        parts = [
            report[metric.name].detach().to(packed) for report in reports if metric.name in report
        ]
        if parts:
            packed[row] = torch.stack(parts).sum(dim=0)
        if metric.reduction == "sum":
            packed[row, 0] = packed[0, 1]
    return packed


def _finish(metric: Metric, total: float, count: float) -> float | None:
    if metric.reduction == "sum":
        return total
    return total / count if count > 0 else None
