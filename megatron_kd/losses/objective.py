"""Compute the loss sum, the token count and the report of a microbatch's hidden states."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_kd.head.options import HeadOptions
from megatron_kd.losses.linear_loss import linear_loss
from megatron_kd.losses.spec import LossInputs, LossSpec, TokenTerms
from megatron_kd.losses.student_statistics import student_statistics
from megatron_kd.losses.token_rules import TokenContext, TokenRule
from megatron_kd.targets.dense import Target
from megatron_kd.targets.sparse import SparseTarget, assign_tail_to_label


@dataclass(frozen=True)
class Objective:
    """Mix next-token cross-entropy with the distillation loss inside the output head.

    Attributes:
        spec: scalars of the loss and the divergence.
        options: layout of hidden states and weight, and memory strategy.
        rules: set what differs from token to token, in this order; sparse targets only.
        entropy_threshold: of this step, see `TokenContext`.
        tail_to_label: True to give the teacher's mass outside the kept ids to the label.
        token_metrics: True to report the metrics of `losses/token_metrics.py`.
    """

    spec: LossSpec
    options: HeadOptions
    rules: tuple[TokenRule, ...] = ()
    entropy_threshold: Tensor | None = None
    tail_to_label: bool = False
    token_metrics: bool = False

    def __call__(
        self,
        hidden: Tensor,
        *,
        weight: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        target: Target | None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return (loss_sum, num_tokens, report) of one microbatch, as megatron-core expects.

        megatron-core divides once, by the global number of tokens.

        Args:
            hidden: [S, B, H], or this rank's slice of S under sequence parallelism.
            weight: [V/tp, H].
            labels: int [B, S].
            loss_mask: fp32 [B, S].
            target: SparseTarget [S, B, K], DenseTarget, or None for plain cross-entropy.

        Returns:
            loss_sum: fp32 scalar, nats.
            num_tokens: int32 scalar.
            report: name -> fp32 [2] = (sum, count).
        """
        mask, labels = loss_mask.t().contiguous(), labels.t().contiguous()
        spec = self.spec if target is not None else replace(self.spec, alpha=0.0, weights="mix")
        terms = None
        if isinstance(target, SparseTarget):
            if self.tail_to_label:
                target = assign_tail_to_label(target, labels)
            if self.rules:
                terms = self._token_terms(hidden, weight, labels, mask, target)
        loss, metrics = linear_loss(
            hidden,
            weight,
            LossInputs(labels, mask, terms),
            target,
            spec,
            self.options,
            token_metrics=self.token_metrics,
        )
        loss_sum, count = loss.total.sum(), mask.sum()
        report = {
            "total_loss": torch.stack([loss_sum.detach(), count]),
            "ce_loss": torch.stack([(loss.ce * mask).sum(), count]),
        }
        if target is not None:
            report["kd_loss"] = torch.stack([(loss.kd * mask).sum(), count])
        if terms is not None:
            report |= _report_terms(terms, mask)
        for name, values in metrics.items():
            known = mask * ~values.isnan()
            report[name] = torch.stack([(values.nan_to_num() * known).sum(), known.sum()])
        return (
            loss_sum,
            count.to(torch.int32),
            {name: value.float() for name, value in report.items()},
        )

    def _token_terms(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, target: SparseTarget
    ) -> TokenTerms:
        """Return the terms [S, B] that the rules set, one after the other."""
        student = None
        if any(rule.needs_student for rule in self.rules):
            student = student_statistics(hidden, weight, labels, target, self.options)
        context = TokenContext(target, mask, self.entropy_threshold, student)
        terms = self.spec.terms()
        for rule in self.rules:
            terms = rule.apply(terms, context)
        return terms


def _report_terms(terms: TokenTerms, mask: Tensor) -> dict[str, Tensor]:
    """Return sums and counts of what the rules set.

    They are the share of tokens without distillation, and the teacher's temperature if it differs
    from token to token.
    """
    report = {}
    if isinstance(terms.kd_weight, Tensor):
        report["routed_share"] = torch.stack([((terms.kd_weight == 0) * mask).sum(), mask.sum()])
    if isinstance(terms.teacher_temperature, Tensor):
        temperatures = (terms.teacher_temperature * mask).sum()
        report["teacher_temperature"] = torch.stack([temperatures, mask.sum()])
    return report
