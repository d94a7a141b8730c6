"""Mix cross-entropy, distillation loss and z-loss, and differentiate the mix.

    total = weight (ce_weight ce + kd_weight kd + z_loss logsumexp^2)

with kd = kd_scale * divergence at the student's temperature t. With respect to the student's
logits z, with p and p^t its softmaxes at temperature 1 and t, and D the divergence,
    d(total)/dz = a p + s dD/d(z / t), on the label further -weight ce_weight
    a = weight (ce_weight + 2 z_loss logsumexp),  s = weight kd_weight kd_scale / t
`losses/reference.py` has the same formula in plain torch; no other file has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kd.head.token_chunks import Chunk
from megatron_kd.losses.spec import IGNORED_LABEL, LossInputs, LossSpec, TokenTerms


@dataclass(frozen=True)
class MixedLosses:
    """Hold the losses [C] of a chunk's tokens, nats; ignored labels have 0 in all three."""

    total: Tensor
    ce: Tensor
    kd: Tensor


@dataclass(frozen=True)
class MixGradient:
    """Hold the coefficients [C] of the logit gradient, see the module.

    Attributes:
        softmax: a, of the student's softmax at temperature 1.
        divergence: s, of the derivative of the divergence by the logits over the temperature.
        label: added on the label.
    """

    softmax: Tensor
    divergence: Tensor
    label: Tensor


@dataclass(frozen=True)
class LossMix:
    """Weigh the losses of each token.

    Attributes:
        labels: int [N], or [C] of a chunk.
        weight: [N], of the token in `total`; 0 if its label is ignored.
        terms: weights and temperatures.
        spec: scalars of the loss, of which the weight of the z-loss is used here.
    """

    labels: Tensor
    weight: Tensor
    terms: TokenTerms
    spec: LossSpec

    @classmethod
    def of(cls, inputs: LossInputs, spec: LossSpec) -> LossMix:
        """Return the mix of all tokens of `inputs`, flattened."""
        labels = inputs.labels.flatten()
        mask = inputs.loss_mask
        weight = torch.ones_like(labels, dtype=torch.float32) if mask is None else mask.flatten()
        weight = torch.where(labels != IGNORED_LABEL, weight, 0.0)
        terms = (inputs.terms or spec.terms()).map(Tensor.flatten)
        return cls(labels, weight, terms, spec)

    def take(self, chunk: Chunk, dtype: torch.dtype) -> LossMix:
        """Return the mix of a chunk's tokens, in the type of the logits."""
        terms = self.terms.map(lambda tensor: chunk.take(tensor).to(dtype))
        return LossMix(chunk.take(self.labels), chunk.take(self.weight).to(dtype), terms, self.spec)

    @property
    def counted(self) -> Tensor:
        """Return bool [C], False where the label is ignored."""
        return self.labels != IGNORED_LABEL

    def losses(self, ce: Tensor, divergence: Tensor, logsumexp: Tensor) -> MixedLosses:
        """Return the losses of each token.

        Args:
            ce: [C], cross-entropy; any number where the label is ignored.
            divergence: [C], at the temperature, not scaled.
            logsumexp: [C], of the student's logits.
        """
        terms, counted = self.terms, self.counted
        ce = torch.where(counted, ce, 0.0)
        kd = torch.where(counted, terms.kd_scale * divergence, 0.0)
        total = self.weight * (
            terms.ce_weight * ce + terms.kd_weight * kd + self.spec.z_loss * logsumexp**2
        )
        return MixedLosses(torch.where(counted, total, 0.0), ce, kd)

    def gradient(self, logsumexp: Tensor, upstream: Tensor | None = None) -> MixGradient:
        """Return the coefficients of the logit gradient.

        Args:
            logsumexp: [C], of the student's logits.
            upstream: [C], gradient of `total`; None for ones.
        """
        terms, weight = self.terms, self.weight
        if upstream is not None:
            weight = weight * torch.where(self.counted, upstream, 0.0).to(weight.dtype)
        return MixGradient(
            weight * (terms.ce_weight + 2.0 * self.spec.z_loss * logsumexp),
            weight * (terms.kd_weight * terms.kd_scale / terms.temperature),
            -terms.ce_weight * weight,
        )
