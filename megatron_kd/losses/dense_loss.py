"""Loss and logit gradient of one chunk of tokens against the teacher's logits of the same chunk, on a vocabulary shard.

Shapes: C tokens, n valid vocabulary rows here, T tensor-parallel ranks. Logarithms are relative to each row's largest logit
until the end, so that logits of 1e4 cost no digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kd.head.logit_rows import ChunkRows
from megatron_kd.head.statistics import local_columns
from megatron_kd.losses.divergence_terms import ABSENT, Divergence
from megatron_kd.losses.sparse_loss import RowLoss
from megatron_kd.losses.spec import IGNORED_LABEL, LossSpec, TokenTerms
from megatron_kd.parallel.collectives import Group, all_gather
from megatron_kd.parallel.vocab_shards import VocabShard

# Logits that the terms, their derivatives and what lies between exist for at one time.
BLOCK_CPU, BLOCK_CUDA = 1 << 17, 1 << 24


@dataclass
class _Softmax:
    """One model's rows: shift [C], the largest logit; logsumexp, logsumexp_t [C], of (logits - shift) and of that over t."""

    shift: Tensor
    logsumexp: Tensor
    logsumexp_t: Tensor

    def log(self, logits: Tensor, part: slice) -> Tensor:
        """Log-probabilities at temperature 1 of the rows `part`, [B, n]."""
        return logits - self.shift[part].unsqueeze(1) - self.logsumexp[part].unsqueeze(1)

    def log_t(self, logits: Tensor, part: slice, temperature: float) -> Tensor:
        """At `temperature`."""
        if temperature == 1.0:
            return self.log(logits, part)
        return (logits - self.shift[part].unsqueeze(1)) / temperature - self.logsumexp_t[
            part
        ].unsqueeze(1)


class DivergenceLoss:
    """The loss of C tokens; `measure` does the work and leaves the logit gradient in place of the student's logits.

    After it only [C] tensors are held here. labels, weight: [C], weight multiplies each token. terms: of these tokens; both
    temperatures are numbers.
    """

    def __init__(
        self,
        labels: Tensor,
        weight: Tensor,
        divergence: Divergence,
        spec: LossSpec,
        terms: TokenTerms,
        shard: VocabShard,
        group: Group,
    ) -> None:
        self.labels, self.divergence, self.spec, self.shard, self.group = (
            labels,
            divergence,
            spec,
            shard,
            group,
        )
        self.terms = terms
        assert not isinstance(terms.temperature, Tensor)
        assert not isinstance(terms.teacher_temperature, Tensor)
        self.temperature, self.teacher_temperature = terms.temperature, terms.teacher_temperature
        self.counted = labels != IGNORED_LABEL
        self.weight = torch.where(self.counted, weight, 0.0)
        self.result: RowLoss | None = None

    def loss(self) -> RowLoss:
        """The chunk's losses, the same bits on every rank of the group."""
        assert self.result is not None
        return self.result

    def gradient(self, rows: ChunkRows, *, start: int, upstream: Tensor | None = None) -> Tensor:
        """d(sum of upstream * total)/d(logits) [C, n]: what `measure` left in `rows`. The loss of a token depends on its row alone."""
        gradient = rows.buffer[:, : rows.valid]
        if upstream is not None:
            gradient *= torch.where(self.weight != 0, upstream, 0.0).to(gradient.dtype).unsqueeze(1)
        return gradient

    def measure(self, rows: ChunkRows, teacher: ChunkRows, *, gradient: bool, health: bool) -> None:
        """Losses, and with `gradient` the logit gradient: in `rows`, using up `teacher`.

        Collectives: all-gathers of [C, 7] (9 with health or hard_label) and of [C, 2] (5), and of [C] between for mse_logits.
        """
        dtype = rows.buffer.dtype
        self.weight, weighs = self.weight.to(dtype), self.terms.map(lambda each: each.to(dtype))
        student, theirs, label, best, agrees = self._statistics(rows, teacher, health=health)
        ce = torch.where(self.counted, student.logsumexp - label, 0.0)
        offset = (
            self._mean_difference(rows, teacher, student, theirs)
            if self.divergence.name == "mse_logits"
            else None
        )
        sums = rows.buffer.new_zeros((len(ce), 5 if health else 2))
        for part in self._blocks(rows):
            z, other = rows.buffer[part, : rows.valid], teacher.buffer[part, : rows.valid]
            log_p, log_q = (
                student.log_t(z, part, self.temperature),
                theirs.log_t(other, part, self.teacher_temperature),
            )
            if health:
                sums[part, 2:] = _entropies_and_kl(student.log(z, part), theirs.log(other, part))
            if best is not None and self.divergence.name == "hard_label":
                columns = local_columns(best[part].unsqueeze(1), self.shard.start, rows.valid)
                one = torch.full_like(teacher.buffer[part], ABSENT).scatter_(1, columns, 0.0)
                log_q = one[:, : rows.valid]
            if offset is not None:
                log_q = log_q + offset[part].unsqueeze(1)
            if gradient:
                terms, slopes = self.divergence.terms_and_slopes(
                    log_q, log_p, self.shard.vocab_size
                )
                sums[part, 1] = slopes.sum(1)
                other.copy_(slopes)
            else:
                terms = self.divergence.terms(log_q, log_p, self.shard.vocab_size)
            sums[part, 0] = terms.sum(1)
        sums = all_gather(sums, self.group).sum(0)
        kd = torch.where(self.counted, weighs.kd_scale * sums[:, 0], 0.0)
        logsumexp = student.logsumexp + student.shift
        total = self.weight * (
            weighs.ce_weight * ce + weighs.kd_weight * kd + self.spec.z_loss * logsumexp**2
        )
        self.result = RowLoss(torch.where(self.counted, total, 0.0), ce, kd, None)
        if health and agrees is not None:
            self.result.health = torch.cat(
                [torch.ones_like(sums[:, :1]), sums[:, 2:4], agrees.unsqueeze(1), sums[:, 4:]], 1
            )
        if gradient:
            self._put_gradient(rows, teacher, student, sums[:, 1], weighs)

    def _blocks(self, rows: ChunkRows) -> Iterator[slice]:
        tokens, width = rows.buffer.shape
        count = max(1, (BLOCK_CUDA if rows.buffer.is_cuda else BLOCK_CPU) // width)
        for start in range(0, tokens, count):
            yield slice(start, min(start + count, tokens))

    def _statistics(
        self, rows: ChunkRows, teacher: ChunkRows, *, health: bool
    ) -> tuple[_Softmax, _Softmax, Tensor, Tensor | None, Tensor | None]:
        """Student, teacher, the label's logit less the student's shift; where needed the teacher's likeliest id (int64) and
        whether it is the student's too (0 or 1). All [C]. One all-gather."""
        t, their_t = self.temperature, self.teacher_temperature
        label = local_columns(self.labels, self.shard.start, rows.valid).unsqueeze(1)
        here = torch.where(label < rows.valid, rows.buffer.gather(1, label), -torch.inf)
        columns = [
            *_masses(rows, t, both=True),
            *_masses(teacher, their_t, both=health),
            here.squeeze(1),
        ]
        wanted = health or self.divergence.name == "hard_label"
        if wanted:
            column = teacher.top(1)[1] if rows.valid else torch.zeros_like(label)
            at_best = rows.buffer.gather(1, column).squeeze(1)
            # An id as a floating-point number: exact up to 2^24 in fp32.
            columns += [at_best, (column.squeeze(1) + self.shard.start).to(at_best.dtype)]
        parts = all_gather(torch.stack(columns, 1), self.group)
        student, theirs = _merge(parts[..., :3], t), _merge(parts[..., 3:6], their_t)
        label_logit = parts[..., 6].amax(0) - student.shift
        if not wanted:
            return student, theirs, label_logit, None, None
        holds = parts[..., 3] == theirs.shift
        best = torch.where(holds, parts[..., 8], torch.inf).amin(0)
        at_best = torch.where(holds & (parts[..., 8] == best), parts[..., 7], -torch.inf).amax(0)
        return (
            student,
            theirs,
            label_logit,
            best.nan_to_num(posinf=0.0).long(),
            (at_best >= student.shift).to(best.dtype),
        )

    def _mean_difference(
        self, rows: ChunkRows, teacher: ChunkRows, student: _Softmax, theirs: _Softmax
    ) -> Tensor:
        """[C] mean over all ids of log p - log q. One all-gather of [C]."""
        found = torch.zeros_like(student.shift)
        for part in self._blocks(rows):
            z, other = rows.buffer[part, : rows.valid], teacher.buffer[part, : rows.valid]
            found[part] = (
                student.log_t(z, part, self.temperature)
                - theirs.log_t(other, part, self.teacher_temperature)
            ).sum(1)
        return all_gather(found, self.group).sum(0) / self.shard.vocab_size

    def _put_gradient(
        self,
        rows: ChunkRows,
        slopes: ChunkRows,
        student: _Softmax,
        slope_sum: Tensor,
        terms: TokenTerms,
    ) -> None:
        """The logit gradient for an upstream gradient of ones, in place of the logits; rows without weight are exactly 0."""
        w = self.weight
        a = (
            w * (terms.ce_weight + 2.0 * self.spec.z_loss * (student.logsumexp + student.shift))
        ).unsqueeze(1)
        s = (w * (terms.kd_weight * terms.kd_scale / self.temperature)).unsqueeze(1)
        at_label = (-terms.ce_weight * w).unsqueeze(1)
        label = local_columns(self.labels, self.shard.start, rows.valid).unsqueeze(1)
        for part in self._blocks(rows):
            z = rows.buffer[part, : rows.valid]
            p_t = student.log_t(z, part, self.temperature).exp_()
            d = (
                slopes.buffer[part, : rows.valid]
                .sub(p_t.mul_(slope_sum[part].unsqueeze(1)))
                .mul_(s[part])
            )
            z.copy_(student.log(z, part).exp_().mul_(a[part]).add_(d))
            rows.buffer[part].scatter_add_(1, label[part], at_label[part])
            z.masked_fill_(w[part].unsqueeze(1) == 0, 0.0)


def _masses(rows: ChunkRows, temperature: float, *, both: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The largest logit m, and the sums of exp(logit - m) (if `both`, else some number) and of exp((logit - m) / temperature): [C]."""
    largest, mass_t = rows.mass(temperature)
    return largest, rows.mass(1.0)[1] if both and temperature != 1.0 else mass_t, mass_t


def _merge(parts: Tensor, temperature: float) -> _Softmax:
    """[T, C, 3] of all ranks, as `_masses`, in rank order: the same bits on every rank."""
    largest, mass, mass_t = parts.unbind(-1)
    shift = largest.amax(0)
    below = largest - shift
    return _Softmax(
        shift,
        (mass * below.exp()).sum(0).log(),
        (mass_t * (below / temperature).exp()).sum(0).log(),
    )


def _entropies_and_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """[B, n] log-probabilities -> [B, 3], this shard's part of the teacher's entropy, the student's, and KL(teacher || student)."""
    q = log_q.exp()
    return torch.stack(
        [-(q * log_q).sum(1), -(log_p.exp() * log_p).sum(1), (q * (log_q - log_p)).sum(1)], 1
    )
