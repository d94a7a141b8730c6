"""Loss and logit gradient of one chunk of tokens on a vocabulary shard, formed in the logits' own buffer.

Gradient of total with respect to the student's logits z (w the token's weight, t temperature, c = t^2 or 1, s = w alpha c / t,
a = w ((1 - alpha) + 2 z_loss logsumexp), p and p^t the student's softmaxes, Q the kept teacher mass, o the tail):
    on a kept id       a p + s (m p^t - q)            m = Q for "drop", else 1
    on any other id    a p + s (m p^t - tail term)    bucket: o p^t / r;  uniform: o / (V - K)
    on the label       further - w (1 - alpha)
p^t / r is the softmax over the other ids alone, so no tail mass is divided by, however small.

Shapes: C tokens, n valid vocabulary rows here, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kd.losses.types import IGNORED_LABEL, LossSpec
from megatron_kd.parallel.collectives import Group
from megatron_kd.parallel.shards import VocabShard
from megatron_kd.targets.rows import RowStatistics, local_columns, row_statistics
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


class ChunkLoss:
    """One chunk: statistics on construction (one all-gather), then the loss, then the gradient in place.

    `buffer` [C, n + 1] holds this rank's logits and a sink column; it is consumed. `weight` [C] multiplies each token.
    """

    def __init__(
        self,
        buffer: Tensor,
        labels: Tensor,
        weight: Tensor,
        target: SparseTarget | None,
        spec: LossSpec,
        shard: VocabShard,
        group: Group,
        *,
        health: bool = False,
    ) -> None:
        self.spec, self.shard, self.labels = spec, shard, labels
        self.counted = labels != IGNORED_LABEL
        self.weight = torch.where(self.counted, weight, 0.0).to(buffer.dtype)
        self.target = target
        if target is None:
            self.indices = labels.new_empty((labels.shape[0], 0))
            self.log_q = buffer.new_empty((labels.shape[0], 0))
            self.log_tail = buffer.new_full((labels.shape[0],), -torch.inf)
        else:
            self.indices = target.indices
            log_q, log_tail = kept_distribution(target, temperature=spec.temperature, tail=spec.tail)
            self.log_q, self.log_tail = log_q.to(buffer.dtype), log_tail.to(buffer.dtype)
            self.indices = torch.where(self.log_q > -torch.inf, self.indices, -1)
        self.q, self.tail_mass = self.log_q.exp(), self.log_tail.exp()
        self.others = shard.vocab_size - (self.indices >= 0).sum(1)
        self.rows: RowStatistics = row_statistics(
            buffer,
            self.indices,
            labels,
            vocab_start=shard.start,
            temperature=spec.temperature,
            group=group,
            rest_sum=spec.tail == "uniform",
            entropy=health,
        )
        self.health = health

    def loss(self) -> RowLoss:
        """The chunk's losses, the same bits on every rank of the group."""
        rows, spec = self.rows, self.spec
        ce = torch.where(self.counted, rows.logsumexp - rows.label, 0.0)
        kd = torch.where(self.counted, spec.kd_scale * self._divergence(), 0.0)
        logsumexp = rows.logsumexp + rows.shift
        total = self.weight * ((1.0 - spec.alpha) * ce + spec.alpha * kd + spec.z_loss * logsumexp**2)
        return RowLoss(torch.where(self.counted, total, 0.0), ce, kd, self._health() if self.health else None)

    def _divergence(self) -> Tensor:
        rows, spec = self.rows, self.spec
        log_p = rows.support / spec.temperature - rows.logsumexp_t.unsqueeze(1)
        kd = (self.q * torch.where(self.q > 0, self.log_q - log_p, 0.0)).sum(1)
        outside = (self.tail_mass > 0) & (self.others > 0)
        if spec.tail == "bucket":
            log_r = rows.rest_logsumexp_t - rows.logsumexp_t
            kd = kd + torch.where(outside, self.tail_mass * (self.log_tail - log_r), 0.0)
        if spec.tail == "uniform" and rows.rest_sum is not None:
            others = self.others.clamp(min=1).to(self.log_tail.dtype)  # log() of integers is fp32
            share = self.tail_mass / others
            log_p_sum = (rows.rest_sum - self.others * rows.shift) / spec.temperature - self.others * rows.logsumexp_t
            kd = kd + torch.where(outside, share * (self.others * (self.log_tail - others.log()) - log_p_sum), 0.0)
        return kd

    def gradient(self) -> Tensor:
        """d(total)/d(logits) [C, n], in the buffer that held the logits. Call after `loss`."""
        rows, spec, w = self.rows, self.spec, self.weight
        a = w * ((1.0 - spec.alpha) + 2.0 * spec.z_loss * (rows.logsumexp + rows.shift))
        s = w * (spec.alpha * spec.kd_scale / spec.temperature)
        b = s * self.q.sum(1) if spec.tail == "drop" or self.target is None else s
        rest, rest_t = (rows.rest_logsumexp - rows.logsumexp).exp(), (rows.rest_logsumexp_t - rows.logsumexp_t).exp()
        bucket = torch.where(self.others > 0, s * self.tail_mass, 0.0) if spec.tail == "bucket" else torch.zeros_like(s)
        # exp() of this rank's rest is relative to its own maximum: bring it to the softmax over all of the rest.
        below = (rows.local_shift - rows.rest_shift).clamp(max=0.0)  # above 0 only where this shard has no rest at all
        here, here_t = below.exp() / rows.rest_mass, (below / spec.temperature).exp() / rows.rest_mass_t
        if rows.exp_t is rows.exp:
            gradient = rows.exp.mul_((((a + b) * rest - bucket) * here).unsqueeze(1))
        else:
            gradient = rows.exp.mul_((a * rest * here).unsqueeze(1))
            gradient.addcmul_(rows.exp_t, ((b * rest_t - bucket) * here_t).unsqueeze(1))
        if spec.tail == "uniform":
            gradient.sub_((s * self.tail_mass / self.others.clamp(min=1)).unsqueeze(1))
        self._write_support(gradient, a, b, s)
        return gradient[:, : self.shard.valid]

    def _write_support(self, gradient: Tensor, a: Tensor, b: Tensor, s: Tensor) -> None:
        """Kept ids get their own gradient, then the label's share is taken off; other ranks' ids fall into the sink."""
        rows, spec = self.rows, self.spec
        columns, _ = local_columns(self.indices, self.shard.start, self.shard.valid)
        p = (rows.support - rows.logsumexp.unsqueeze(1)).exp()
        p_t = (rows.support / spec.temperature - rows.logsumexp_t.unsqueeze(1)).exp()
        kept = a.unsqueeze(1) * p + b.unsqueeze(1) * p_t - s.unsqueeze(1) * self.q
        gradient.scatter_(1, columns, kept)
        column, _ = local_columns(self.labels.unsqueeze(1), self.shard.start, self.shard.valid)
        gradient.scatter_add_(1, column, (-(1.0 - spec.alpha) * self.weight).unsqueeze(1))

    def _health(self) -> Tensor:
        """[C, 5], see HEALTH. At temperature 1 whatever the loss uses, so that schedules do not move it."""
        rows, target = self.rows, self.target
        nothing = torch.full_like(self.weight, torch.nan)
        student_entropy = rows.entropy if rows.entropy is not None else nothing
        if target is None or target.sampled:
            return torch.stack([nothing, nothing, student_entropy, nothing, nothing], 1)
        used = self.indices >= 0
        lp = torch.where(used, target.logprobs, -torch.inf).to(self.q.dtype)
        mass = lp.exp().sum(1).clamp(max=1.0)
        log_p = rows.support - rows.logsumexp.unsqueeze(1)
        log_r = rows.rest_logsumexp - rows.logsumexp
        outside = target.log_tail.to(lp.dtype) if target.log_tail is not None and target.temperature == 1.0 else torch.log1p(-mass)
        kl = (lp.exp() * torch.where(used, lp - log_p, 0.0)).sum(1)
        kl = kl + torch.where((outside > -torch.inf) & (log_r > -torch.inf), outside.exp() * (outside - log_r), 0.0)
        best = lp.argmax(1, keepdim=True)
        agrees = (rows.support.gather(1, best).squeeze(1) >= 0).to(lp.dtype)
        teacher_entropy = target.entropy.to(lp.dtype) if target.entropy is not None else nothing
        return torch.stack([mass, teacher_entropy, student_entropy, agrees, kl], 1)
