"""The same loss on logits that somebody else has already multiplied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_kd.head.output_weight import compute_dtype, given_logits
from megatron_kd.head.sizes import chunk_size
from megatron_kd.head.token_chunks import TokenChunks
from megatron_kd.losses.sparse_loss import TokenLoss
from megatron_kd.losses.spec import KDLoss, LossSpec, check_inputs
from megatron_kd.parallel.collectives import Group, group_rank, group_size
from megatron_kd.parallel.vocab_shards import VocabShard, vocab_shard
from megatron_kd.targets.sparse import SparseTarget


def kd_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    target: SparseTarget | None,
    *,
    alpha: float,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    tail: str = "renormalize",
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    tp_group: Group = None,
) -> KDLoss:
    """Cross-entropy and sparse distillation loss of given logits, vocabulary-parallel.

    Formulas: `reference_kd_cross_entropy`. Where the logits come from one product, `linear_kd_cross_entropy` needs far less
    memory and rounds less: bf16 logits alone cost accuracy near the teacher.

    Args:
        logits: [..., V/tp] any float type, this rank's shard before temperature. Not modified; its gradient has its type.
        labels: [...] int, -100 is ignored. target: SparseTarget [..., K] or None (then alpha must be 0).
        vocab_size: true vocabulary size; later columns are padding: no probability, zero gradient. tp_group: None = unsharded.
    Returns:
        KDLoss [...], identical on every rank of the group; fp32 (fp64 for fp64 logits).
    Raises:
        ValueError: bad sizes, types, scalars or targets, before any collective.
    Collectives: forward one all-gather of [C, K + 6] per chunk; backward none. Memory: the gradient, and one chunk.
    """
    spec = LossSpec(alpha, temperature, temperature_squared, tail, z_loss)
    shard = vocab_shard(
        logits.shape[-1],
        rank=group_rank(tp_group),
        size=group_size(tp_group),
        vocab_size=vocab_size,
    )
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels {tuple(labels.shape)} must have the logits' leading shape {tuple(logits.shape[:-1])}"
        )
    check_inputs(labels, target, None, spec, vocab_size=shard.vocab_size)
    if not torch.is_grad_enabled():  # a leaf asks for its gradient even then
        logits = logits.detach()
    total, ce, kd = _GivenLogits.apply(
        logits, labels.reshape(-1), target and target.flatten(), spec, shard, tp_group
    )
    return KDLoss(total.view(labels.shape), ce.view(labels.shape), kd.view(labels.shape))


class _GivenLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        target: SparseTarget | None,
        spec: LossSpec,
        shard: VocabShard,
        group: Group,
    ) -> tuple[Tensor, ...]:
        rows = logits.detach().reshape(-1, logits.shape[-1])
        losses = rows.new_zeros((3, rows.shape[0]), dtype=compute_dtype(rows.dtype))
        gradient = torch.zeros_like(rows) if logits.requires_grad else None
        chunks = TokenChunks(
            rows.shape[0], 1, chunk_size(None, shard.share, rows.shape[0], on_cuda=rows.is_cuda)
        )
        for part, chunk in given_logits(rows, shard, chunks):
            ones = torch.ones_like(losses[0, part])
            rows_of = target.slice(part.start, part.stop) if target is not None else None
            token_loss = TokenLoss(chunk, labels[part], ones, rows_of, spec, shard, group)
            loss = token_loss.loss()
            losses[0, part], losses[1, part], losses[2, part] = loss.total, loss.ce, loss.kd
            if gradient is not None:
                gradient[part, : shard.valid] = token_loss.gradient(chunk, start=shard.start).to(
                    gradient.dtype
                )
        ctx.gradient, ctx.shape = gradient, logits.shape
        total, ce, kd = losses.unbind()
        ctx.mark_non_differentiable(ce, kd)
        return total, ce, kd

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradient = ctx.gradient
        if gradient is None:
            raise RuntimeError(
                "backward through this loss a second time: its gradient was handed out and is gone"
            )
        ctx.gradient = None
        return (
            gradient.mul_(upstream.unsqueeze(1).to(gradient.dtype)).view(ctx.shape),
            None,
            None,
            None,
            None,
            None,
        )
