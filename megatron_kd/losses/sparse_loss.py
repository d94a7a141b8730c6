"""Compute the loss and the logit gradient of a chunk of tokens against a sparse target.

With a, s and the label's coefficient from `losses/mix.py`, p and p^t the student's softmaxes at
temperature 1 and at t, f' the derivative of the divergence by the student's log-probability of an
entry and G their sum (`Slopes`), the gradient with respect to the student's logits is
    on a kept id       a p + s (f' - p^t G)
    on any other id    a p + s (f' p^t / r - p^t G - u)
where f' of the others is that of their one entry, r their mass, and u the equal share of the tail
under "uniform", else 0. p^t / r is the softmax over the other ids alone, so that no tail mass is
divided by, however small.

Shapes: C tokens, n valid vocabulary rows on this rank, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kd.head.chunk_loss import ChunkLoss, TokenValues
from megatron_kd.head.logit_rows import ChunkRows, GradientTerms, is_tempered
from megatron_kd.head.statistics import (
    RowStatistics,
    StatisticsQuery,
    local_columns,
    over_entries,
    row_statistics,
)
from megatron_kd.head.token_chunks import Chunk
from megatron_kd.losses.mix import LossMix
from megatron_kd.losses.sparse_comparison import (
    Slopes,
    SparseComparison,
    TeacherEntries,
    no_entries,
    student_entries,
    teacher_entries,
)
from megatron_kd.losses.spec import LossInputs, LossSpec
from megatron_kd.losses.token_metrics import (
    TokenStatistics,
    compute_token_metrics,
    token_metric_names,
)
from megatron_kd.parallel.collectives import Group
from megatron_kd.parallel.vocab_shards import VocabShard
from megatron_kd.targets.sparse import SparseTarget


@dataclass(frozen=True)
class SparseState:
    """Hold what the logit gradient of a chunk needs besides the logits: [C] and [C, K] tensors.

    Attributes:
        mix: weights of the chunk's tokens.
        statistics: of the student's rows.
        indices: [C, K] kept ids, -1 for an unused slot.
        slopes: derivatives of the divergence.
        tail_mass: [C], spread evenly over the other ids; None unless tail is "uniform".
        num_others: int [C], number of other ids.
    """

    mix: LossMix
    statistics: RowStatistics
    indices: Tensor
    slopes: Slopes
    tail_mass: Tensor | None
    num_others: Tensor


class SparseLoss(ChunkLoss[SparseState]):
    """Mix cross-entropy with a divergence from a sparse target, or with nothing.

    Collectives:
        One all-gather of [C, K + 6] per chunk.
    """

    def __init__(
        self,
        inputs: LossInputs,
        target: SparseTarget | None,
        spec: LossSpec,
        shard: VocabShard,
        group: Group,
        *,
        token_metrics: bool = False,
    ) -> None:
        """Take checked inputs of all tokens.

        Args:
            inputs: labels, mask and terms of the full sequence.
            target: [S, B, K], or None for cross-entropy alone.
            spec: the scalars of the loss.
            shard: this rank's part of the vocabulary.
            group: tensor-parallel group.
            token_metrics: True to report the token metrics too, which costs one pass over the
                logits.
        """
        metrics = token_metric_names(has_teacher=target is not None) if token_metrics else ()
        super().__init__(("ce", "kd", *metrics))
        self._mix = LossMix.of(inputs, spec)
        self._target = None if target is None else target.flatten()
        self._spec, self._shard, self._group = spec, shard, group
        self._token_metrics = token_metrics

    def measure(self, rows: ChunkRows, chunk: Chunk) -> tuple[TokenValues, SparseState]:
        """Return the values of a chunk and the state of its gradient, see `ChunkLoss`."""
        spec, dtype = self._spec, rows.buffer.dtype
        mix = self._mix.take(chunk, dtype)
        target = None if self._target is None else self._target.map(chunk.take)
        teacher = self._teacher_entries(target, mix, dtype)
        uniform = spec.tail == "uniform" and target is not None
        statistics = row_statistics(
            rows,
            teacher.indices,
            labels=mix.labels,
            vocab_start=self._shard.start,
            group=self._group,
            query=StatisticsQuery(mix.terms.temperature, uniform, self._token_metrics),
        )
        divergence, slopes = self._compare(target, teacher, statistics, mix)
        losses = mix.losses(
            statistics.logsumexp - statistics.label,
            divergence,
            statistics.logsumexp + statistics.shift,
        )
        reported = {"ce": losses.ce, "kd": losses.kd}
        if self._token_metrics:
            token_statistics = _token_statistics(losses.ce, statistics, target, teacher)
            reported |= compute_token_metrics(token_statistics, has_teacher=target is not None)
        tail_mass = teacher.log_tail.exp() if uniform else None
        state = SparseState(mix, statistics, teacher.indices, slopes, tail_mass, teacher.num_others)
        return TokenValues(losses.total, reported), state

    def _teacher_entries(
        self, target: SparseTarget | None, mix: LossMix, dtype: torch.dtype
    ) -> TeacherEntries:
        vocab_size = self._shard.vocab_size
        if target is None:
            return no_entries(mix.labels, vocab_size=vocab_size, dtype=dtype)
        return teacher_entries(
            target,
            temperature=mix.terms.teacher_temperature,
            tail=self._spec.tail,
            vocab_size=vocab_size,
            dtype=dtype,
        )

    def _compare(
        self,
        target: SparseTarget | None,
        teacher: TeacherEntries,
        statistics: RowStatistics,
        mix: LossMix,
    ) -> tuple[Tensor, Slopes]:
        if target is None:
            zeros = torch.zeros_like(mix.weight)
            return zeros, Slopes(torch.zeros_like(teacher.log_q), zeros, zeros)
        student = student_entries(statistics, teacher.num_others, mix.terms.temperature)
        comparison = SparseComparison(teacher, student, self._spec.tail, self._shard.vocab_size)
        return self._spec.divergence.compare_sparse(comparison)

    def logit_gradient(
        self, rows: ChunkRows, state: SparseState, *, start: int, upstream: Tensor | None = None
    ) -> Tensor:
        """Return the gradient [C, n] of any part of this rank's vocabulary, see `ChunkLoss`.

        `rows` may be the logits that `measure` has split, or logits with their support.
        """
        statistics, slopes, temperature = (
            state.statistics,
            state.slopes,
            state.mix.terms.temperature,
        )
        mix = state.mix.gradient(statistics.logsumexp + statistics.shift, upstream)
        a, s = mix.softmax, mix.divergence
        rest = (statistics.rest_logsumexp - statistics.logsumexp).exp()
        rest_t = (statistics.rest_logsumexp_t - statistics.logsumexp_t).exp()
        p = (statistics.support - statistics.logsumexp.unsqueeze(1)).exp()
        p_t = p
        if is_tempered(temperature):
            scaled = statistics.support / over_entries(temperature)
            p_t = (scaled - statistics.logsumexp_t.unsqueeze(1)).exp()
        share = None
        if state.tail_mass is not None:
            share = s * state.tail_mass / state.num_others.clamp(min=1)
        return rows.gradient(
            GradientTerms(
                shift=statistics.rest_shift,
                scale=a * rest / statistics.rest_mass,
                scale_t=s * (slopes.rest - slopes.total * rest_t) / statistics.rest_mass_t,
                constant=share,
                temperature=temperature,
                columns=local_columns(state.indices, start, rows.valid),
                support=a.unsqueeze(1) * p
                + s.unsqueeze(1) * (slopes.support - slopes.total.unsqueeze(1) * p_t),
                label=local_columns(state.mix.labels, start, rows.valid),
                label_value=mix.label,
            )
        )


def _token_statistics(
    ce: Tensor, statistics: RowStatistics, target: SparseTarget | None, teacher: TeacherEntries
) -> TokenStatistics:
    """Return the statistics for token metrics.

    A sampled target yields those of the student only.
    """
    if target is None or target.sampled:
        return TokenStatistics(ce, statistics.entropy)
    used = teacher.indices >= 0
    log_q = torch.where(used, target.logprobs, -torch.inf).to(ce.dtype)
    mass = log_q.exp().sum(1).clamp(max=1.0)
    log_p = statistics.support - statistics.logsumexp.unsqueeze(1)
    log_rest = statistics.rest_logsumexp - statistics.logsumexp
    log_tail = torch.log1p(-mass)
    if target.log_tail is not None and target.temperature == 1.0:
        log_tail = target.log_tail.to(ce.dtype)
    kl = (log_q.exp() * torch.where(used, log_q - log_p, 0.0)).sum(1)
    has_rest = (log_tail > -torch.inf) & (log_rest > -torch.inf)
    kl = kl + torch.where(has_rest, log_tail.exp() * (log_tail - log_rest), 0.0)
    top = log_q.argmax(1, keepdim=True)
    return TokenStatistics(
        ce,
        student_entropy=statistics.entropy,
        teacher_entropy=None if target.entropy is None else target.entropy.to(ce.dtype),
        teacher_mass=mass,
        kl=kl,
        top_id_gap=statistics.support.gather(1, top).squeeze(1),
    )
