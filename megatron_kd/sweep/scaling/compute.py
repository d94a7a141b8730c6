"""Compare distilled with supervised pretraining at equal tokens and at equal FLOPs.

The teacher's FLOPs are included (arXiv 2502.08606):

    FLOPs of a distilled student = 3 F_S D + F_T (logits D + pretraining 3 D_T)

F: FLOPs of a forward pass over one token (training is three of them). logits: the share of the
teacher's forward passes that this student pays for: 1 with the teacher online, 1/k where k students
read one cache, 0 where the cache exists. pretraining: its share of the teacher's own training: 0
for a teacher that exists, 1 for one trained for this student alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_kd.config import ConfigError
from megatron_kd.sweep.scaling.laws import DistillationLaw


def forward_flops(parameters: float) -> float:
    """Return the FLOPs of a forward pass over one token: 2 for each parameter without embeddings.

    Attention scores and the head are left out; `planning.flops.flops_per_token` counts them where
    the model's shape is known.
    """
    return 2.0 * parameters


@dataclass(frozen=True)
class TrainingFlops:
    """Hold what the FLOPs of a distilled run depend on, see the module.

    Attributes:
        student_forward: FLOPs of the student's forward pass over one token.
        teacher_forward: the same of the teacher.
        logits: share of the teacher's forward passes that this student pays for.
        pretraining: share of the teacher's own training that this student pays for.
        teacher_tokens: tokens that the teacher was trained on.

    Raises:
        ConfigError: if a number is negative or not finite, or a share has no number of tokens.
    """

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
        are_valid = all(math.isfinite(value) and value >= 0 for value in values)
        if self.student_forward <= 0 or not are_valid:
            raise ConfigError(
                "FLOPs, shares and tokens must not be negative, and a student's forward pass is "
                f"not free: {self}"
            )
        if self.pretraining > 0 and self.teacher_tokens == 0:
            raise ConfigError(
                "a share of the teacher's training has a price only with the number of tokens it "
                "was trained on"
            )

    def supervised(self, tokens: float) -> float:
        """Return the FLOPs of plain training on `tokens`."""
        return 3 * self.student_forward * tokens

    def distilled(self, tokens: float) -> float:
        """Return the FLOPs of distillation on `tokens`, the teacher's share included."""
        teacher_tokens = self.logits * tokens + self.pretraining * 3 * self.teacher_tokens
        return self.supervised(tokens) + self.teacher_forward * teacher_tokens

    def supervised_tokens(self, tokens: float) -> float:
        """Return the tokens of plain training for the FLOPs of distillation on `tokens`."""
        return self.distilled(tokens) / (3 * self.student_forward)


@dataclass(frozen=True)
class Comparison:
    """Hold the losses of one student, distilled and supervised, in nats per token.

    Attributes:
        distilled: distilled.
        equal_tokens: supervised, on the same tokens.
        equal_flops: supervised, for the same FLOPs.
        equal_flops_tokens: tokens of the latter.
        flops: FLOPs of the distilled run.
    """

    distilled: float
    equal_tokens: float
    equal_flops: float
    equal_flops_tokens: float
    flops: float


def compare(
    law: DistillationLaw,
    parameters: float,
    tokens: float,
    teacher_loss: float,
    flops: TrainingFlops,
) -> Comparison:
    """Return the losses of one student, distilled and supervised.

    Args:
        law: the law of distilled runs.
        parameters: the student's, without embeddings.
        tokens: tokens of the distilled run.
        teacher_loss: the teacher's cross-entropy.
        flops: what the runs' FLOPs depend on.
    """
    equal_flops_tokens = flops.supervised_tokens(tokens)
    return Comparison(
        distilled=float(law.loss(parameters, tokens, teacher_loss)),
        equal_tokens=float(law.supervised.loss(parameters, tokens)),
        equal_flops=float(law.supervised.loss(parameters, equal_flops_tokens)),
        equal_flops_tokens=equal_flops_tokens,
        flops=flops.distilled(tokens),
    )
