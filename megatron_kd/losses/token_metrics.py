"""Declare the per-token metrics of teacher and student. A new metric is an entry of TOKEN_METRICS.

They are at temperature 1 whatever the loss uses, so that its settings do not move them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenStatistics:
    """Hold statistics of the C tokens of a chunk, from which token metrics are computed.

    Each is [C] at temperature 1 in the type of the logits, or None if the target does not hold it.

    Attributes:
        ce: cross-entropy of the student on the label, 0 if the label is ignored, nats.
        student_entropy: over the full vocabulary, nats.
        teacher_entropy: over the full vocabulary, nats.
        teacher_mass: probability that the teacher gives to the compared ids.
        kl: KL(teacher || student) over the compared ids and one entry for all others, nats.
        top_id_gap: logit of the student at the teacher's most probable id, minus its largest
            logit, or None.
    """

    ce: Tensor
    student_entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None
    teacher_mass: Tensor | None = None
    kl: Tensor | None = None
    top_id_gap: Tensor | None = None


@dataclass(frozen=True)
class TokenMetric:
    """Declare a metric.

    Attributes:
        name: key in metrics.jsonl.
        unit: "nats", or the range of a share.
        description: one line of documentation.
        compute: map statistics to values [C], or None if they are unknown. Unknown values and NaN
            do not count in the metric's mean.
        needs_teacher: False if the metric is reported without a target too.
    """

    name: str
    unit: str
    description: str
    compute: Callable[[TokenStatistics], Tensor | None]
    needs_teacher: bool = True


def _top1_agreement(statistics: TokenStatistics) -> Tensor | None:
    gap = statistics.top_id_gap
    return None if gap is None else (gap >= 0).to(gap.dtype)


TOKEN_METRICS: tuple[TokenMetric, ...] = (
    TokenMetric(
        "teacher_mass",
        "in [0, 1]",
        "teacher probability of the kept entries",
        lambda statistics: statistics.teacher_mass,
    ),
    TokenMetric(
        "teacher_entropy",
        "nats",
        "entropy of the teacher over the full vocabulary",
        lambda statistics: statistics.teacher_entropy,
    ),
    TokenMetric(
        "student_entropy",
        "nats",
        "entropy of the student over the full vocabulary",
        lambda statistics: statistics.student_entropy,
        needs_teacher=False,
    ),
    TokenMetric(
        "top1_agreement",
        "in [0, 1]",
        "share of tokens where teacher and student rank the same id first",
        _top1_agreement,
    ),
    TokenMetric(
        "kl",
        "nats",
        "sum_k p_T(k) * (log p_T(k) - log p_S(k)) at temperature 1, kept entries + one tail bucket",
        lambda statistics: statistics.kl,
    ),
)


def token_metric_names(*, has_teacher: bool) -> tuple[str, ...]:
    """Return the names of the metrics that are reported with or without a target, in order."""
    return tuple(metric.name for metric in _metrics(has_teacher))


def compute_token_metrics(statistics: TokenStatistics, *, has_teacher: bool) -> dict[str, Tensor]:
    """Return the metrics [C] by name, NaN where one is unknown."""
    values = {metric.name: metric.compute(statistics) for metric in _metrics(has_teacher)}
    unknown = torch.full_like(statistics.ce, torch.nan)
    return {name: unknown if value is None else value for name, value in values.items()}


def _metrics(has_teacher: bool) -> list[TokenMetric]:
    return [metric for metric in TOKEN_METRICS if has_teacher or not metric.needs_teacher]
