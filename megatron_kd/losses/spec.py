"""Define the inputs and results of every distillation loss, and check them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_kd.losses.divergence import Divergence
from megatron_kd.targets.sparse import TAILS, SparseTarget, check_target, check_temperature

IGNORED_LABEL = -100
WEIGHTS = ("mix", "keep_ce", "keep_kd")


class KDLoss(NamedTuple):
    """Hold the losses of each token, nats, unreduced, identical on every tensor-parallel rank.

    A label of -100 makes all three zero.

    Attributes:
        total: [...], ((1 - alpha) * ce + alpha * kd + z_loss * logsumexp^2) * loss_mask.
        ce: [...], cross-entropy, detached.
        kd: [...], distillation loss, detached.
    """

    total: Tensor
    ce: Tensor
    kd: Tensor


@dataclass(frozen=True)
class LossSpec:
    """Hold the scalars of the loss and its divergence.

    Attributes:
        alpha: weight of the distillation loss, in [0, 1].
        temperature: divides both models' logits in the distillation loss, > 0.
        temperature_squared: True to multiply the distillation loss by temperature^2.
        tail: treatment of the teacher's mass outside the kept ids of a sparse target.
        z_loss: weight of the squared logsumexp of the student, >= 0.
        weights: weights of the two losses. "mix": 1 - alpha and alpha; "keep_ce": 1 and alpha;
            "keep_kd": 1 - alpha and 1 (the loss-scale ablation of arXiv 2605.23857).
        teacher_only: True to divide the teacher's logits alone (equation 4 of arXiv 2410.16215).
        divergence: compared with the teacher.
    """

    alpha: float
    temperature: float = 1.0
    temperature_squared: bool = False
    tail: str = "renormalize"
    z_loss: float = 0.0
    weights: str = "mix"
    teacher_only: bool = False
    divergence: Divergence = field(default_factory=Divergence)

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
        """Return the weight of the cross-entropy."""
        return 1.0 if self.weights == "keep_ce" else 1.0 - self.alpha

    @property
    def kd_weight(self) -> float:
        """Return the weight of the distillation loss."""
        return 1.0 if self.weights == "keep_kd" else self.alpha

    @property
    def kd_scale(self) -> float:
        """Return the factor of the distillation loss: temperature^2 or 1."""
        return self.temperature**2 if self.temperature_squared else 1.0

    def terms(self) -> TokenTerms:
        """Return the weights and temperatures of the spec, the same for every token."""
        return TokenTerms(
            self.ce_weight,
            self.kd_weight,
            1.0 if self.teacher_only else self.temperature,
            self.temperature,
            self.kd_scale,
        )


@dataclass(frozen=True)
class TokenTerms:
    """Hold what may differ from token to token.

    Each is a number for all tokens, or fp32 [...] of the labels' shape, not differentiated.

    Attributes:
        ce_weight: weight of the cross-entropy.
        kd_weight: weight of the distillation loss.
        temperature: divides the student's logits in the distillation loss.
        teacher_temperature: divides the teacher's logits.
        kd_scale: factor of the distillation loss, reported with it.
    """

    ce_weight: float | Tensor
    kd_weight: float | Tensor
    temperature: float | Tensor = 1.0
    teacher_temperature: float | Tensor = 1.0
    kd_scale: float | Tensor = 1.0

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenTerms:
        """Return the terms with `function` applied to every tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return TokenTerms(
            **{
                name: function(value) if isinstance(value, Tensor) else value
                for name, value in values.items()
            }
        )


@dataclass(frozen=True)
class LossInputs:
    """Hold the per-token inputs of a loss, of the full sequence on every rank.

    Attributes:
        labels: int [S, B] (or [N]), already shifted; -100 is ignored.
        loss_mask: float of the labels' shape, weight of each token in `total`; None: ones.
        terms: of each token; None: the spec's.
    """

    labels: Tensor
    loss_mask: Tensor | None = None
    terms: TokenTerms | None = None


def check_inputs(
    inputs: LossInputs, target: SparseTarget | None, spec: LossSpec, *, vocab_size: int
) -> None:
    """Check what a loss is computed from, before any collective. Values are read on a CPU only.

    Args:
        inputs: per-token inputs.
        target: of the labels' shape, or None.
        spec: scalars.
        vocab_size: true vocabulary size.

    Raises:
        ValueError: they do not fit together or are out of range, on every rank alike.
    """
    labels, loss_mask, terms = inputs.labels, inputs.loss_mask, inputs.terms
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
                f"terms.{f.name} {tuple(value.shape)} must have the labels' shape "
                f"{tuple(labels.shape)}"
            )
    if target is not None:
        check_target(target, labels.shape, vocab_size=vocab_size)
        temperature = (terms or spec.terms()).teacher_temperature
        check_temperature(target, temperature=temperature, tail=spec.tail)
    if labels.is_cpu and labels.numel():
        invalid = ((labels < 0) | (labels >= vocab_size)) & (labels != IGNORED_LABEL)
        if bool(invalid.any()):
            raise ValueError(
                f"label {int(labels[invalid][0])} is not in the vocabulary (0..{vocab_size - 1}) "
                f"nor {IGNORED_LABEL} (ignored)"
            )
