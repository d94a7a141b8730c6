"""Compute the loss and the logit gradient of a chunk of tokens against the teacher's logits.

With a, s and the label's coefficient from `losses/mix.py`, p and p^t the student's softmaxes at
temperature 1 and at t, f' the derivative of an id's term by its log p^t and G the sum of all f',
the gradient with respect to the student's logits is
    a p + s (f' - p^t G), on the label further its coefficient
It replaces the student's logits, so that a chunk holds two buffers [C, V/tp] and only [C] tensors
outlive it.

Shapes: C tokens, n valid vocabulary rows on this rank, B tokens of a block, T tensor-parallel
ranks. Logarithms are relative to each row's largest logit until the end, so that logits of 1e4
cost no digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kd.head.chunk_loss import ChunkLoss, TokenValues
from megatron_kd.head.logit_rows import ChunkRows
from megatron_kd.head.output_weight import LogitChunks
from megatron_kd.head.statistics import local_columns
from megatron_kd.head.token_chunks import Chunk
from megatron_kd.losses.mix import LossMix
from megatron_kd.losses.sparse_comparison import ABSENT
from megatron_kd.losses.spec import LossInputs, LossSpec
from megatron_kd.losses.token_metrics import (
    TokenStatistics,
    compute_token_metrics,
    token_metric_names,
)
from megatron_kd.parallel.collectives import Group, all_gather
from megatron_kd.parallel.vocab_shards import VocabShard

# Logits for which terms, their derivatives and intermediate results exist at one time.
BLOCK_CPU, BLOCK_CUDA = 1 << 17, 1 << 24


@dataclass(frozen=True)
class _Softmax:
    """Hold the normalisation of one model's rows over the whole vocabulary.

    Attributes:
        shift: [C], the largest logit.
        logsumexp: [C], of (logits - shift).
        logsumexp_t: [C], of (logits - shift) / temperature.
    """

    shift: Tensor
    logsumexp: Tensor
    logsumexp_t: Tensor


@dataclass(frozen=True)
class _Model:
    """Hold one model's logits of a chunk and their normalisation."""

    rows: ChunkRows
    softmax: _Softmax
    temperature: float

    def logits(self, block: slice) -> Tensor:
        """Return a view [B, n] of the logits of a block of tokens."""
        return self.rows.buffer[block, : self.rows.valid]

    def log_probs(self, block: slice) -> Tensor:
        """Return log-probabilities [B, n] at temperature 1."""
        softmax, logits = self.softmax, self.logits(block)
        return logits - softmax.shift[block].unsqueeze(1) - softmax.logsumexp[block].unsqueeze(1)

    def log_probs_t(self, block: slice) -> Tensor:
        """Return log-probabilities [B, n] at the model's temperature."""
        if self.temperature == 1.0:
            return self.log_probs(block)
        softmax, logits = self.softmax, self.logits(block)
        scaled = (logits - softmax.shift[block].unsqueeze(1)) / self.temperature
        return scaled - softmax.logsumexp_t[block].unsqueeze(1)


@dataclass(frozen=True)
class _Pair:
    """Hold both models' logits of a chunk and the merged results of one all-gather.

    Attributes:
        student: the student's logits.
        teacher: the teacher's logits.
        label: [C], the student's logit of the label, minus its shift.
        top_id: int64 [C], the teacher's most probable id, of equal ones the smallest; or None.
        top_id_gap: [C], the student's logit of that id, minus its shift; or None.
    """

    student: _Model
    teacher: _Model
    label: Tensor
    top_id: Tensor | None = None
    top_id_gap: Tensor | None = None


class DenseLoss(ChunkLoss[LossMix]):
    """Mix cross-entropy with a divergence from the teacher's whole distribution.

    `measure` forms the logit gradient at once, because the teacher's logits exist only then.

    Collectives:
        Per chunk all-gathers of [C, 7] (9 with token metrics or a divergence that needs the top id)
        and of [C, 2] (5), and one of [C] between them for a centred divergence.
    """

    recomputable = False

    def __init__(  # noqa: PLR0913 (two flags beside the arguments of SparseLoss)
        self,
        inputs: LossInputs,
        teacher_logits: LogitChunks,
        spec: LossSpec,
        shard: VocabShard,
        group: Group,
        *,
        differentiate: bool,
        token_metrics: bool = False,
    ) -> None:
        """Take checked inputs of all tokens.

        Args:
            inputs: labels, mask and terms of the full sequence; both temperatures are numbers.
            teacher_logits: the teacher's logits of the head's chunks, in order; they are consumed.
            spec: the scalars of the loss.
            shard: this rank's part of the vocabulary.
            group: tensor-parallel group.
            differentiate: True to form the logit gradient.
            token_metrics: True to report the token metrics too.
        """
        metrics = token_metric_names(has_teacher=True) if token_metrics else ()
        super().__init__(("ce", "kd", *metrics))
        self._mix = LossMix.of(inputs, spec)
        self._teacher_logits, self._shard, self._group = teacher_logits, shard, group
        self._divergence = spec.divergence
        self._differentiate, self._token_metrics = differentiate, token_metrics

    def measure(self, rows: ChunkRows, chunk: Chunk) -> tuple[TokenValues, LossMix]:
        """Return the values of a chunk and leave the gradient in `rows`, see `ChunkLoss`."""
        mix = self._mix.take(chunk, rows.buffer.dtype)
        _, teacher_rows = next(self._teacher_logits)
        pair = self._pair(rows, teacher_rows, mix)
        sums = all_gather(self._sums(pair), self._group).sum(0)
        softmax = pair.student.softmax
        logsumexp = softmax.logsumexp + softmax.shift
        losses = mix.losses(softmax.logsumexp - pair.label, sums[:, 0], logsumexp)
        reported = {"ce": losses.ce, "kd": losses.kd}
        if self._token_metrics:
            statistics = TokenStatistics(
                losses.ce,
                student_entropy=sums[:, 3],
                teacher_entropy=sums[:, 2],
                teacher_mass=torch.ones_like(losses.ce),
                kl=sums[:, 4],
                top_id_gap=pair.top_id_gap,
            )
            reported |= compute_token_metrics(statistics, has_teacher=True)
        if self._differentiate:
            self._put_gradient(pair, sums[:, 1], logsumexp, mix)
        return TokenValues(losses.total, reported), mix

    def logit_gradient(
        self, rows: ChunkRows, state: LossMix, *, start: int, upstream: Tensor | None = None
    ) -> Tensor:
        """Return the gradient [C, n] that `measure` left in `rows`, see `ChunkLoss`."""
        gradient = rows.buffer[:, : rows.valid]
        if upstream is not None:
            # The loss of a token depends on its row alone.
            factor = torch.where(state.weight != 0, upstream, 0.0).to(gradient.dtype)
            gradient *= factor.unsqueeze(1)
        return gradient

    def _blocks(self, rows: ChunkRows) -> Iterator[slice]:
        tokens, width = rows.buffer.shape
        count = max(1, (BLOCK_CUDA if rows.buffer.is_cuda else BLOCK_CPU) // width)
        for start in range(0, tokens, count):
            yield slice(start, min(start + count, tokens))

    def _pair(self, rows: ChunkRows, teacher_rows: ChunkRows, mix: LossMix) -> _Pair:
        """Return both models' normalisation; one all-gather."""
        temperature, teacher_temperature = mix.terms.temperature, mix.terms.teacher_temperature
        assert not isinstance(temperature, Tensor)
        assert not isinstance(teacher_temperature, Tensor)
        label = local_columns(mix.labels, self._shard.start, rows.valid).unsqueeze(1)
        label_logit = torch.where(label < rows.valid, rows.buffer.gather(1, label), -torch.inf)
        columns = [
            *_masses(rows, temperature, untempered=True),
            *_masses(teacher_rows, teacher_temperature, untempered=self._token_metrics),
            label_logit.squeeze(1),
        ]
        with_top = self._token_metrics or self._divergence.declaration.needs_top_id
        if with_top:
            column = teacher_rows.top(1)[1] if rows.valid else torch.zeros_like(label)
            logit_at_top = rows.buffer.gather(1, column).squeeze(1)
            # An id as a floating-point number: exact up to 2^24 in fp32.
            top_id = (column.squeeze(1) + self._shard.start).to(logit_at_top.dtype)
            columns += [logit_at_top, top_id]
        packed = all_gather(torch.stack(columns, 1), self._group)
        student = _Model(rows, _merge(packed[..., :3], temperature), temperature)
        teacher = _Model(
            teacher_rows, _merge(packed[..., 3:6], teacher_temperature), teacher_temperature
        )
        label_gap = packed[..., 6].amax(0) - student.softmax.shift
        if not with_top:
            return _Pair(student, teacher, label_gap)
        return _Pair(student, teacher, label_gap, *_merge_top(packed, student, teacher))

    def _sums(self, pair: _Pair) -> Tensor:
        """Return this rank's sums over ids, [C, 2], or [C, 5] with token metrics.

        The columns are the divergence, its slopes, and with token metrics the teacher's entropy,
        the student's, and KL(teacher || student). The slopes replace the teacher's logits.
        """
        student, teacher, vocab_size = pair.student, pair.teacher, self._shard.vocab_size
        declaration = self._divergence.declaration
        offset = self._mean_difference(student, teacher) if declaration.centred else None
        sums = student.rows.buffer.new_zeros((len(pair.label), 5 if self._token_metrics else 2))
        for block in self._blocks(student.rows):
            log_p, log_q = student.log_probs_t(block), teacher.log_probs_t(block)
            if self._token_metrics:
                sums[block, 2:] = _entropies_and_kl(
                    student.log_probs(block), teacher.log_probs(block)
                )
            if pair.top_id is not None and declaration.needs_top_id:
                log_q = self._one_hot(pair.top_id[block], teacher.rows.buffer[block])
            if offset is not None:
                log_q = log_q + offset[block].unsqueeze(1)
            if self._differentiate:
                terms, slopes = self._divergence.terms_and_slopes(log_q, log_p, vocab_size)
                sums[block, 1] = slopes.sum(1)
                teacher.logits(block).copy_(slopes)
            else:
                terms = self._divergence.terms(log_q, log_p, vocab_size)
            sums[block, 0] = terms.sum(1)
        return sums

    def _one_hot(self, top_id: Tensor, like: Tensor) -> Tensor:
        """Return log-probabilities [B, n] of the distribution that is 1 at `top_id` [B]."""
        valid = self._shard.valid
        columns = local_columns(top_id.unsqueeze(1), self._shard.start, valid)
        return torch.full_like(like, ABSENT).scatter_(1, columns, 0.0)[:, :valid]

    def _mean_difference(self, student: _Model, teacher: _Model) -> Tensor:
        """Return the mean [C] over all ids of log p - log q; one all-gather of [C]."""
        sums = torch.zeros_like(student.softmax.shift)
        for block in self._blocks(student.rows):
            sums[block] = (student.log_probs_t(block) - teacher.log_probs_t(block)).sum(1)
        return all_gather(sums, self._group).sum(0) / self._shard.vocab_size

    def _put_gradient(
        self, pair: _Pair, slope_sum: Tensor, logsumexp: Tensor, mix: LossMix
    ) -> None:
        """Replace the student's logits by the gradient; rows without weight are exactly 0.

        Args:
            pair: the student's logits, and the slopes in place of the teacher's.
            slope_sum: [C], over all ids.
            logsumexp: [C], of the student's logits.
            mix: weights of the chunk's tokens.
        """
        student, rows = pair.student, pair.student.rows
        coefficients = mix.gradient(logsumexp)
        a, s = coefficients.softmax.unsqueeze(1), coefficients.divergence.unsqueeze(1)
        at_label = coefficients.label.unsqueeze(1)
        label = local_columns(mix.labels, self._shard.start, rows.valid).unsqueeze(1)
        for block in self._blocks(rows):
            logits, slopes = student.logits(block), pair.teacher.logits(block)
            p_t = student.log_probs_t(block).exp_()
            d = slopes.sub(p_t.mul_(slope_sum[block].unsqueeze(1))).mul_(s[block])
            logits.copy_(student.log_probs(block).exp_().mul_(a[block]).add_(d))
            rows.buffer[block].scatter_add_(1, label[block], at_label[block])
            logits.masked_fill_(mix.weight[block].unsqueeze(1) == 0, 0.0)


def _masses(
    rows: ChunkRows, temperature: float, *, untempered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest logit m, and the masses at temperature 1 and at `temperature`, all [C].

    A mass is the sum of exp((logit - m) / temperature). Unless `untempered`, the one at 1 is
    undefined.
    """
    largest, mass_t = rows.mass(temperature)
    return largest, rows.mass(1.0)[1] if untempered and temperature != 1.0 else mass_t, mass_t


def _merge(packed: Tensor, temperature: float) -> _Softmax:
    """Return the normalisation from [T, C, 3] of all ranks, in rank order, as by `_masses`."""
    largest, mass, mass_t = packed.unbind(-1)
    shift = largest.amax(0)
    below = largest - shift
    return _Softmax(
        shift,
        (mass * below.exp()).sum(0).log(),
        (mass_t * (below / temperature).exp()).sum(0).log(),
    )


def _merge_top(packed: Tensor, student: _Model, teacher: _Model) -> tuple[Tensor, Tensor]:
    """Return the teacher's top id and the student's gap there from [T, C, 9] of all ranks."""
    has_largest = packed[..., 3] == teacher.softmax.shift
    top_id = torch.where(has_largest, packed[..., 8], torch.inf).amin(0)
    is_top = has_largest & (packed[..., 8] == top_id)
    logit_at_top = torch.where(is_top, packed[..., 7], -torch.inf).amax(0)
    return top_id.nan_to_num(posinf=0.0).long(), logit_at_top - student.softmax.shift


def _entropies_and_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return this shard's part [B, 3] of the teacher's entropy, the student's, and KL of [B, n]."""
    q = log_q.exp()
    return torch.stack(
        [-(q * log_q).sum(1), -(log_p.exp() * log_p).sum(1), (q * (log_q - log_p)).sum(1)], 1
    )
