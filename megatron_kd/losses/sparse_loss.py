"""Loss and logit gradient of one chunk of tokens on a vocabulary shard.

Gradient of total with respect to the student's logits z (w the token's weight, e and k what its two losses count, usually
1 - alpha and alpha, t the student's temperature, c = t^2 or 1, s = w k c / t, a = w (e + 2 z_loss logsumexp), p and p^t the
student's softmaxes, Q the kept teacher mass, o the tail):
    on a kept id       a p + s (m p^t - q)            m = Q for "drop", else 1
    on any other id    a p + s (m p^t - tail term)    bucket: o p^t / r;  uniform: o / (V - K)
    on the label       further - w e
p^t / r is the softmax over the other ids alone, so no tail mass is divided by, however small.

Shapes: C tokens, n valid vocabulary rows here, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kd.head.logit_rows import ChunkRows, GradientTerms, is_tempered
from megatron_kd.head.statistics import RowStatistics, local_columns, over_entries, row_statistics
from megatron_kd.losses.spec import IGNORED_LABEL, LossSpec, TokenTerms
from megatron_kd.parallel.collectives import Group
from megatron_kd.parallel.vocab_shards import VocabShard
from megatron_kd.targets.sparse import SparseTarget, kept_distribution


@dataclass
class RowLoss:
    """[C] per token: total (times weight), ce and kd; `health` [C, 5] where asked for, see `HEALTH`."""

    total: Tensor
    ce: Tensor
    kd: Tensor
    health: Tensor | None


# Columns of RowLoss.health: kept teacher mass, teacher and student entropy (nats), agreement of the likeliest ids (0 or 1),
# forward KL at temperature 1 on the kept ids and one bucket for the rest (nats). NaN where the target does not hold it.
HEALTH = ("teacher_mass", "teacher_entropy", "student_entropy", "top1_agreement", "kl")


class TokenLoss:
    """The loss of C tokens, and all that their logit gradient takes besides the logits. Holds [C, K] tensors, no logits.

    Construction takes the statistics of `rows`, this rank's logits (one all-gather), and lifts the support out of them.
    `weight` [C] multiplies each token. terms: of these tokens; None: the spec's.
    """

    def __init__(
        self,
        rows: ChunkRows,
        labels: Tensor,
        weight: Tensor,
        target: SparseTarget | None,
        spec: LossSpec,
        shard: VocabShard,
        group: Group,
        *,
        terms: TokenTerms | None = None,
        health: bool = False,
    ) -> None:
        dtype = rows.buffer.dtype
        self.terms = (terms or spec.terms()).map(lambda each: each.to(dtype))
        self.spec, self.shard, self.labels = spec, shard, labels
        self.counted = labels != IGNORED_LABEL
        self.weight = torch.where(self.counted, weight, 0.0).to(dtype)
        self.target = target
        if target is None:
            self.indices = labels.new_empty((labels.shape[0], 0))
            self.log_q = self.weight.new_empty((labels.shape[0], 0))
            self.log_tail = self.weight.new_full((labels.shape[0],), -torch.inf)
        else:
            self.indices = target.indices
            log_q, log_tail = kept_distribution(
                target, temperature=self.terms.teacher_temperature, tail=spec.tail
            )
            self.log_q, self.log_tail = log_q.to(dtype), log_tail.to(dtype)
            self.indices = torch.where(self.log_q > -torch.inf, self.indices, -1)
        self.q, self.tail_mass = self.log_q.exp(), self.log_tail.exp()
        self.others = shard.vocab_size - (self.indices >= 0).sum(1)
        self.stats: RowStatistics = row_statistics(
            rows,
            self.indices,
            labels,
            vocab_start=shard.start,
            temperature=self.terms.temperature,
            group=group,
            rest_sum=spec.tail == "uniform",
            entropy=health,
        )
        self.health = health

    def loss(self) -> RowLoss:
        """The chunk's losses, the same bits on every rank of the group."""
        stats, terms = self.stats, self.terms
        ce = torch.where(self.counted, stats.logsumexp - stats.label, 0.0)
        kd = torch.where(self.counted, terms.kd_scale * self._divergence(), 0.0)
        logsumexp = stats.logsumexp + stats.shift
        total = self.weight * (
            terms.ce_weight * ce + terms.kd_weight * kd + self.spec.z_loss * logsumexp**2
        )
        return RowLoss(
            torch.where(self.counted, total, 0.0), ce, kd, self._health() if self.health else None
        )

    def _divergence(self) -> Tensor:
        stats, spec, temperature = self.stats, self.spec, self.terms.temperature
        log_p = stats.support / over_entries(temperature) - stats.logsumexp_t.unsqueeze(1)
        kd = (self.q * torch.where(self.q > 0, self.log_q - log_p, 0.0)).sum(1)
        outside = (self.tail_mass > 0) & (self.others > 0)
        if spec.tail == "bucket":
            log_r = stats.rest_logsumexp_t - stats.logsumexp_t
            kd = kd + torch.where(outside, self.tail_mass * (self.log_tail - log_r), 0.0)
        if spec.tail == "uniform" and stats.rest_sum is not None:
            others = self.others.clamp(min=1).to(self.log_tail.dtype)  # log() of integers is fp32
            share = self.tail_mass / others
            log_p_sum = (
                stats.rest_sum - self.others * stats.shift
            ) / temperature - self.others * stats.logsumexp_t
            kd = kd + torch.where(
                outside, share * (self.others * (self.log_tail - others.log()) - log_p_sum), 0.0
            )
        return kd

    def gradient(self, rows: ChunkRows, *, start: int, upstream: Tensor | None = None) -> Tensor:
        """d(sum of upstream * total)/d(logits) [C, n] for the logits in `rows`, whose first id is `start`; consumes them.

        upstream: [C], None for ones. `rows` may be any part of this rank's vocabulary, with or without its support.
        """
        stats, spec, terms = self.stats, self.spec, self.terms
        w = (
            self.weight
            if upstream is None
            else self.weight * torch.where(self.counted, upstream, 0.0).to(self.weight.dtype)
        )
        a = w * (terms.ce_weight + 2.0 * spec.z_loss * (stats.logsumexp + stats.shift))
        s = w * (terms.kd_weight * terms.kd_scale / terms.temperature)
        rest, rest_t = (
            (stats.rest_logsumexp - stats.logsumexp).exp(),
            (stats.rest_logsumexp_t - stats.logsumexp_t).exp(),
        )
        on_support, on_rest, whole = self._slopes()
        p = (stats.support - stats.logsumexp.unsqueeze(1)).exp()
        p_t = p
        if is_tempered(terms.temperature):
            p_t = (
                stats.support / over_entries(terms.temperature) - stats.logsumexp_t.unsqueeze(1)
            ).exp()
        return rows.gradient(
            GradientTerms(
                shift=stats.rest_shift,
                scale=a * rest / stats.rest_mass,
                scale_t=s * (on_rest - whole * rest_t) / stats.rest_mass_t,
                constant=s * self.tail_mass / self.others.clamp(min=1)
                if spec.tail == "uniform"
                else None,
                temperature=terms.temperature,
                columns=local_columns(self.indices, start, rows.valid),
                support=a.unsqueeze(1) * p
                + s.unsqueeze(1) * (on_support - whole.unsqueeze(1) * p_t),
                label=local_columns(self.labels, start, rows.valid),
                label_value=-terms.ce_weight * w,
            )
        )

    def _slopes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Derivatives of the divergence with respect to log p^t of each kept id [C, K] and of all others together [C], and their
        sum [C], which falls on every id times -p^t. What "uniform" gives each other id is not among the first two."""
        drops = self.spec.tail == "drop" or self.target is None
        bucket = (self.others > 0) if self.spec.tail == "bucket" else torch.zeros_like(self.counted)
        whole = self.q.sum(1) if drops else torch.ones_like(self.tail_mass)
        return -self.q, -torch.where(bucket, self.tail_mass, 0.0), -whole

    def _health(self) -> Tensor:
        """[C, 5], see HEALTH. At temperature 1 whatever the loss uses, so that schedules do not move it."""
        stats, target = self.stats, self.target
        nothing = torch.full_like(self.weight, torch.nan)
        student_entropy = stats.entropy if stats.entropy is not None else nothing
        if target is None or target.sampled:
            return torch.stack([nothing, nothing, student_entropy, nothing, nothing], 1)
        used = self.indices >= 0
        lp = torch.where(used, target.logprobs, -torch.inf).to(self.q.dtype)
        mass = lp.exp().sum(1).clamp(max=1.0)
        log_p = stats.support - stats.logsumexp.unsqueeze(1)
        log_r = stats.rest_logsumexp - stats.logsumexp
        outside = (
            target.log_tail.to(lp.dtype)
            if target.log_tail is not None and target.temperature == 1.0
            else torch.log1p(-mass)
        )
        kl = (lp.exp() * torch.where(used, lp - log_p, 0.0)).sum(1)
        kl = kl + torch.where(
            (outside > -torch.inf) & (log_r > -torch.inf), outside.exp() * (outside - log_r), 0.0
        )
        best = lp.argmax(1, keepdim=True)
        agrees = (stats.support.gather(1, best).squeeze(1) >= 0).to(lp.dtype)
        teacher_entropy = target.entropy.to(lp.dtype) if target.entropy is not None else nothing
        return torch.stack([mass, teacher_entropy, student_entropy, agrees, kl], 1)
