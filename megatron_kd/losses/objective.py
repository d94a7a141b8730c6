"""What a microbatch's hidden states are worth: a loss sum, a token count and a report, never a mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Protocol

import torch
from torch import Tensor

from megatron_kd.losses.divergence_terms import Divergence
from megatron_kd.losses.divergences import DivergenceHead
from megatron_kd.losses.head import HeadOptions
from megatron_kd.losses.look import look_at
from megatron_kd.losses.sparse_loss import HEALTH
from megatron_kd.losses.spec import KDLoss, LossSpec, TokenTerms
from megatron_kd.losses.token_rules import Seen, TokenRule
from megatron_kd.targets import Target
from megatron_kd.targets.sparse import SparseTarget


class HeadLoss(Protocol):
    """A loss through the output head: `losses.divergences.DivergenceHead`."""

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        target: Target | None,
        spec: LossSpec,
        options: HeadOptions,
        *,
        loss_mask: Tensor | None = None,
        terms: TokenTerms | None = None,
    ) -> tuple[KDLoss, Tensor | None]:
        """[S, B] losses and, if asked for, the columns of `losses.rows.HEALTH` [S, B, 5]."""


@dataclass(frozen=True)
class Objective:
    """Mixes next-token cross-entropy with the distillation loss inside the output head.

    options: layout of hidden states and weight, and the walk over chunks. head_loss: the divergence; forward KL from sparse
    targets by default. rules: what differs from token to token, in this order; sparse targets only. cut: of this step, see `Seen`.
    prepare: what becomes of a sparse target [S, B, K] and the labels [S, B] first.
    """

    spec: LossSpec
    options: HeadOptions
    head_loss: HeadLoss = DivergenceHead(Divergence("forward_kl"))
    rules: tuple[TokenRule, ...] = ()
    cut: Tensor | None = None
    prepare: Callable[[SparseTarget, Tensor], SparseTarget] | None = None

    def __call__(
        self,
        hidden: Tensor,
        *,
        weight: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        target: Target | None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """One microbatch, in megatron-core's form: (loss_sum, num_tokens, report); it divides by the global tokens once.

        Args:
            hidden: [S, B, H] (this rank's slice of S under sequence parallelism). weight: [V/tp, H].
            labels, loss_mask: [B, S]. target: SparseTarget [S, B, K] or DenseTeacher, or None for plain cross-entropy.
        Returns:
            loss_sum: fp32 scalar, nats. num_tokens: int32 scalar. report: name -> fp32 [2] = (sum, count).
        """
        mask, labels = loss_mask.t().contiguous(), labels.t().contiguous()
        spec = self.spec if target is not None else LossSpec(alpha=0.0, z_loss=self.spec.z_loss)
        if isinstance(target, SparseTarget) and self.prepare is not None:
            target = self.prepare(target, labels)
        terms = None
        if isinstance(target, SparseTarget) and self.rules:
            seen = Seen(
                target,
                mask,
                self.cut,
                cache(partial(look_at, hidden, weight, labels, target, self.options)),
            )
            terms = spec.terms()
            for rule in self.rules:
                terms = rule(terms, seen)
        loss, health = self.head_loss(
            hidden, weight, labels, target, spec, self.options, loss_mask=mask, terms=terms
        )
        loss_sum, count = loss.total.sum(), mask.sum()
        report = {
            "total_loss": torch.stack([loss_sum.detach(), count]),
            "ce_loss": torch.stack([(loss.ce * mask).sum(), count]),
        }
        if target is not None:
            report["kd_loss"] = torch.stack([(loss.kd * mask).sum(), count])
        if terms is not None:
            report |= _means(terms, mask)
        if health is not None:
            for name, column in zip(HEALTH, health.unbind(-1), strict=True):
                if target is not None or name == "student_entropy":
                    known = mask * ~column.isnan()
                    report[name] = torch.stack([(column.nan_to_num() * known).sum(), known.sum()])
        return (
            loss_sum,
            count.to(torch.int32),
            {name: value.float() for name, value in report.items()},
        )


def _means(terms: TokenTerms, mask: Tensor) -> dict[str, Tensor]:
    """What rules did, as sums and counts: the share of tokens left to their labels, and the teacher's temperature where it differs."""
    found = {}
    if isinstance(terms.kd_weight, Tensor):
        found["routed_share"] = torch.stack([((terms.kd_weight == 0) * mask).sum(), mask.sum()])
    if isinstance(terms.teacher_temperature, Tensor):
        found["teacher_temperature"] = torch.stack(
            [(terms.teacher_temperature * mask).sum(), mask.sum()]
        )
    return found
