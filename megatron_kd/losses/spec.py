"""What every distillation loss takes and gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_kd.targets.sparse import TAILS, SparseTarget, check_target, check_temperature

IGNORED_LABEL = -100
WEIGHTS = ("mix", "keep_ce", "keep_kd")


class KDLoss(NamedTuple):
    """Per token, nats, unreduced, identical on every tensor-parallel rank; `ce` and `kd` are detached.

    total = ((1 - alpha) * ce + alpha * kd + z_loss * logsumexp^2) * loss_mask. A label of -100 makes all three zero.
    """

    total: Tensor
    ce: Tensor
    kd: Tensor


@dataclass(frozen=True)
class LossSpec:
    """The scalars of the loss.

    alpha in [0, 1] is the weight of the distillation loss; temperature > 0 divides both models' logits in it;
    temperature_squared multiplies it by temperature^2; tail says what becomes of the teacher's mass outside the kept ids;
    z_loss >= 0 weighs the squared logsumexp of the student. weights: what the two losses count: "mix" 1 - alpha and alpha;
    "keep_ce" 1 and alpha; "keep_kd" 1 - alpha and 1 (the loss-scale ablation of arXiv 2605.23857). teacher_only: the temperature
    divides the teacher's logits alone (equation 4 of arXiv 2410.16215).
    """

    alpha: float
    temperature: float = 1.0
    temperature_squared: bool = False
    tail: str = "renormalize"
    z_loss: float = 0.0
    weights: str = "mix"
    teacher_only: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must be in [0, 1], not {self.alpha}")
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be > 0, not {self.temperature}")
        if self.tail not in TAILS:
            raise ValueError(f"tail must be one of {', '.join(TAILS)}, not {self.tail!r}")
        if not 0.0 <= self.z_loss < float("inf"):
            raise ValueError(f"z_loss must be >= 0, not {self.z_loss}")
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, not {self.weights!r}")

    @property
    def ce_weight(self) -> float:
        """Weight of the cross-entropy."""
        return 1.0 if self.weights == "keep_ce" else 1.0 - self.alpha

    @property
    def kd_weight(self) -> float:
        """Weight of the distillation loss."""
        return 1.0 if self.weights == "keep_kd" else self.alpha

    @property
    def kd_scale(self) -> float:
        """Factor of the distillation loss: temperature^2 or 1."""
        return self.temperature**2 if self.temperature_squared else 1.0

    def terms(self) -> TokenTerms:
        """The same for every token."""
        return TokenTerms(
            self.ce_weight,
            self.kd_weight,
            1.0 if self.teacher_only else self.temperature,
            self.temperature,
            self.kd_scale,
        )


@dataclass(frozen=True)
class TokenTerms:
    """What may differ from token to token: each a number for all of them, or fp32 [...] of the labels' shape, not differentiated.

    ce_weight, kd_weight: of the two losses. temperature, teacher_temperature: what divides the logits of the student and of the
    teacher in the distillation loss. kd_scale: its factor, reported with it.
    """

    ce_weight: float | Tensor
    kd_weight: float | Tensor
    temperature: float | Tensor = 1.0
    teacher_temperature: float | Tensor = 1.0
    kd_scale: float | Tensor = 1.0

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenTerms:
        """The same with `function` applied to every tensor."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return TokenTerms(
            **{
                name: function(value) if isinstance(value, Tensor) else value
                for name, value in named.items()
            }
        )


def check_inputs(
    labels: Tensor,
    target: SparseTarget | None,
    loss_mask: Tensor | None,
    spec: LossSpec,
    *,
    vocab_size: int,
    terms: TokenTerms | None = None,
) -> None:
    """ValueError for what cannot be a loss, on every rank alike and before any collective. Values are read on CPU only."""
    if labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, not {labels.dtype}")
    if loss_mask is not None and loss_mask.shape != labels.shape:
        raise ValueError(
            f"loss_mask {tuple(loss_mask.shape)} must have the labels' shape {tuple(labels.shape)}"
        )
    if target is None and spec.kd_weight != 0.0:
        raise ValueError(f"alpha = {spec.alpha} needs a target: without one alpha must be 0")
    for f in fields(terms) if terms is not None else ():
        value = getattr(terms, f.name)
        if isinstance(value, Tensor) and value.shape != labels.shape:
            raise ValueError(
                f"terms.{f.name} {tuple(value.shape)} must have the labels' shape {tuple(labels.shape)}"
            )
    if target is not None:
        check_target(target, labels.shape, vocab_size=vocab_size)
        check_temperature(
            target, temperature=(terms or spec.terms()).teacher_temperature, tail=spec.tail
        )
    if labels.is_cpu and labels.numel():
        wrong = ((labels < 0) | (labels >= vocab_size)) & (labels != IGNORED_LABEL)
        if bool(wrong.any()):
            raise ValueError(
                f"label {int(labels[wrong][0])} is not in the vocabulary (0..{vocab_size - 1}) nor {IGNORED_LABEL} (ignored)"
            )
