"""Distilled against supervised pretraining at equal tokens and at equal FLOPs, the teacher's included (arXiv 2502.08606).

    FLOPs of a distilled student = 3 F_S D + F_T (logits D + pretraining 3 D_T)

F: FLOPs of a forward pass over one token (training is three of them). logits: the share of the teacher's forward passes that this
student pays for: 1 with the teacher online, 1/k where k students read one cache, 0 where the cache exists. pretraining: its share of the
teacher's own training: 0 for a teacher that exists, 1 for one trained for this student alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_kd.config import ConfigError
from megatron_kd.sweep.scaling.law import DistillationLaw


def forward_flops(parameters: float) -> float:
    """FLOPs of a forward pass over one token: 2 for each parameter outside embeddings. Attention scores and the head are left out;
    `telemetry.flops.flops_per_token` counts them where the model's shape is known."""
    return 2.0 * parameters


@dataclass(frozen=True)
class Prices:
    """What a distilled run pays, see the module: FLOPs per token of both models' forward passes, and shares of the teacher's work."""

    student_forward: float
    teacher_forward: float
    logits: float = 1.0
    pretraining: float = 0.0
    teacher_tokens: float = 0.0

    def __post_init__(self) -> None:
        values = (
            self.student_forward,
            self.teacher_forward,
            self.logits,
            self.pretraining,
            self.teacher_tokens,
        )
        if self.student_forward <= 0 or not all(
            math.isfinite(value) and value >= 0 for value in values
        ):
            raise ConfigError(
                f"FLOPs, shares and tokens must not be negative, and a student's forward pass is not free: {self}"
            )
        if self.pretraining > 0 and self.teacher_tokens == 0:
            raise ConfigError(
                "a share of the teacher's training has a price only with the number of tokens it was trained on"
            )

    def supervised(self, tokens: float) -> float:
        """FLOPs of plain training on `tokens`."""
        return 3 * self.student_forward * tokens

    def distilled(self, tokens: float) -> float:
        """FLOPs of distillation on `tokens`, the teacher's share included."""
        return self.supervised(tokens) + self.teacher_forward * (
            self.logits * tokens + self.pretraining * 3 * self.teacher_tokens
        )

    def supervised_tokens(self, tokens: float) -> float:
        """Tokens of plain training for the FLOPs of distillation on `tokens`."""
        return self.distilled(tokens) / (3 * self.student_forward)


@dataclass(frozen=True)
class Comparison:
    """Losses in nats per token: distilled and supervised on the same tokens; supervised for the same FLOPs, on `equal_flops_tokens`."""

    distilled: float
    equal_tokens: float
    equal_flops: float
    equal_flops_tokens: float
    flops: float


def compare(
    law: DistillationLaw, parameters: float, tokens: float, teacher_loss: float, prices: Prices
) -> Comparison:
    """One student distilled and trained alone."""
    more = prices.supervised_tokens(tokens)
    return Comparison(
        distilled=float(law.loss(parameters, tokens, teacher_loss)),
        equal_tokens=float(law.supervised.loss(parameters, tokens)),
        equal_flops=float(law.supervised.loss(parameters, more)),
        equal_flops_tokens=more,
        flops=prices.distilled(tokens),
    )
