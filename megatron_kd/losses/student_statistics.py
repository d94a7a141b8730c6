"""Measure the student before its loss: one more forward of the head, for rules that need it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kd.head.options import HeadOptions, check_head
from megatron_kd.head.output_weight import linear_logits
from megatron_kd.head.statistics import RowStatistics, row_statistics
from megatron_kd.targets.sparse import SparseTarget


@dataclass(frozen=True)
class StudentStatistics:
    """Hold the student's statistics before its loss.

    Attributes:
        deviation: [S, B], standard deviation of its logits at the kept ids.
        distance: [S, B], Hellinger distance from the teacher, in [0, 1].
    """

    deviation: Tensor
    distance: Tensor


@torch.no_grad()
def student_statistics(
    hidden: Tensor, weight: Tensor, labels: Tensor, target: SparseTarget, options: HeadOptions
) -> StudentStatistics:
    """Return statistics of the student's logits at the kept ids of each token.

    The Hellinger distance, sqrt(sum of (sqrt p - sqrt q)^2 / 2), is at temperature 1 over the kept
    ids and one entry for all others.

    Args:
        hidden: as in `linear_kd_cross_entropy`; so are weight and labels.
        weight: [V/tp, H].
        labels: [S, B], of which only the shape is used.
        target: [S, B, K].
        options: layout of hidden and weight.

    Collectives:
        Those of the forward of `linear_kd_cross_entropy`.
    """
    shard = check_head(hidden, weight, labels, options)
    chunks = options.chunks(labels.numel(), shard, on_cuda=hidden.is_cuda)
    states, flat_target = hidden.reshape(-1, hidden.shape[-1]), target.flatten()
    results: Tensor | None = None
    for chunk, rows in linear_logits(states, weight, shard, chunks, options.tp_group):
        chunk_target = flat_target.map(chunk.take)
        statistics = row_statistics(
            rows, chunk_target.indices, vocab_start=shard.start, group=options.tp_group
        )
        if results is None:
            results = rows.buffer.new_zeros((2, labels.numel()))
        chunk.put(results[0], standard_deviation(statistics.support, chunk_target.indices >= 0))
        chunk.put(results[1], _hellinger(statistics, chunk_target))
    assert results is not None
    return StudentStatistics(*results.view(2, *labels.shape))


def _hellinger(statistics: RowStatistics, target: SparseTarget) -> Tensor:
    """Return the Hellinger distance [C] over the kept ids and one entry for the rest."""
    used = target.indices >= 0
    log_q = torch.where(used, target.logprobs, -torch.inf).to(statistics.support.dtype)
    log_p = statistics.support - statistics.logsumexp.unsqueeze(1)
    log_tail = torch.log(-torch.expm1(log_q.logsumexp(1).clamp(max=0.0)))
    if target.log_tail is not None and target.temperature == 1.0:
        log_tail = target.log_tail.to(log_q.dtype)
    log_rest = statistics.rest_logsumexp - statistics.logsumexp
    # Not 1 - sum of sqrt(p q), which has no digits left if the models agree.
    on_support = (((0.5 * log_q).exp() - (0.5 * log_p).exp()) ** 2).sum(1)
    on_rest = ((0.5 * log_tail).exp() - (0.5 * log_rest).exp()) ** 2
    return (0.5 * (on_support + on_rest)).sqrt()


def standard_deviation(logits: Tensor, used: Tensor) -> Tensor:
    """Return the standard deviation [...] of the entries `used` of [..., K], over their number."""
    count = used.sum(-1, keepdim=True).clamp(min=1)
    known = torch.where(used, logits, 0.0)
    mean = known.sum(-1, keepdim=True) / count
    return (torch.where(used, known - mean, 0.0) ** 2).sum(-1).div(count.squeeze(-1)).sqrt()
