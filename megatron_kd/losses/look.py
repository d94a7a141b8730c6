"""One look at the student before its loss: the logits' product once more, without gradient, for rules that need to know it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_kd.head.chunked_head import HeadCall, HeadFunction
from megatron_kd.head.logit_rows import ChunkRows
from megatron_kd.head.statistics import row_statistics
from megatron_kd.losses.head import HeadOptions, check_head
from megatron_kd.losses.sparse_loss import RowLoss
from megatron_kd.losses.token_rules import Look, deviation
from megatron_kd.parallel.collectives import Group
from megatron_kd.parallel.vocab_shards import VocabShard
from megatron_kd.targets.sparse import SparseTarget


@torch.no_grad()
def look_at(
    hidden: Tensor, weight: Tensor, labels: Tensor, target: SparseTarget, options: HeadOptions
) -> Look:
    """The student's logits at the kept ids of each token [S, B], compared with the teacher's.

    The Hellinger distance, sqrt(sum of (sqrt p - sqrt q)^2 / 2), is at temperature 1 over the kept ids and one entry for all others.
    Arguments and collectives as in `linear_kd_cross_entropy`'s forward.
    """
    shard = check_head(hidden, weight, labels, options)
    _, chunks = options.plan(labels.numel(), shard, on_cuda=hidden.is_cuda)

    def make(rows: ChunkRows, take: Callable[[Tensor], Tensor]) -> _Compared:
        return _Compared(rows, target.flatten().map(take), shard, options.tp_group)

    call = HeadCall(make, shard, options.tp_group, chunks, "evaluate", 2)
    found = HeadFunction.apply(
        hidden.detach().reshape(-1, hidden.shape[-1]), weight.detach(), call
    )[3]
    deviations, distances = found.view(*labels.shape, 2).unbind(-1)
    return Look(deviations, distances)


class _Compared:
    """A chunk's two columns, in the place where a loss has its health."""

    def __init__(
        self, rows: ChunkRows, target: SparseTarget, shard: VocabShard, group: Group
    ) -> None:
        nowhere = torch.full_like(target.indices[:, 0], -1)
        stats = row_statistics(rows, target.indices, nowhere, vocab_start=shard.start, group=group)
        used = target.indices >= 0
        kept = torch.where(used, target.logprobs, -torch.inf).to(stats.support.dtype)
        log_p = stats.support - stats.logsumexp.unsqueeze(1)
        outside = torch.log(-torch.expm1(kept.logsumexp(1).clamp(max=0.0)))
        if target.log_tail is not None and target.temperature == 1.0:
            outside = target.log_tail.to(kept.dtype)
        log_r = stats.rest_logsumexp - stats.logsumexp
        # Not 1 - sum of sqrt(p q), which has no digits left where the models agree.
        apart = (((0.5 * kept).exp() - (0.5 * log_p).exp()) ** 2).sum(1) + (
            (0.5 * outside).exp() - (0.5 * log_r).exp()
        ) ** 2
        distance = (0.5 * apart).sqrt()
        nothing = torch.zeros_like(distance)
        self.found = RowLoss(
            nothing, nothing, nothing, torch.stack([deviation(stats.support, used), distance], 1)
        )

    def loss(self) -> RowLoss:
        """See ChunkLoss."""
        return self.found

    def gradient(self, rows: ChunkRows, *, start: int, upstream: Tensor | None = None) -> Tensor:
        """Nobody differentiates a look."""
        raise NotImplementedError("a look has no gradient")
