"""Compute the sparse distillation loss of logits that exist already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_kd.head.output_weight import compute_dtype, split_logits
from megatron_kd.head.sizes import chunk_size
from megatron_kd.head.token_chunks import TokenChunks
from megatron_kd.losses.sparse_loss import SparseLoss
from megatron_kd.losses.spec import KDLoss, LossInputs, LossSpec, check_inputs
from megatron_kd.parallel.collectives import Group, group_rank, group_size
from megatron_kd.parallel.vocab_shards import VocabShard, vocab_shard
from megatron_kd.targets.sparse import SparseTarget


def kd_cross_entropy(  # noqa: PLR0913 (public signature)
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
    """Return cross-entropy and sparse distillation loss of existing logits, vocabulary-parallel.

    Formulas: `reference_kd_cross_entropy`. If the logits come from one product,
    `linear_kd_cross_entropy` needs far less memory and rounds less: bf16 logits alone cost accuracy
    near the teacher.

    Args:
        logits: [..., V/tp] any float type, this rank's shard before temperature. Not modified; its
            gradient has its type.
        labels: [...] int, -100 is ignored.
        target: SparseTarget [..., K], or None (then alpha must be 0).
        alpha: as in `linear_kd_cross_entropy`.
        temperature: as in `linear_kd_cross_entropy`.
        temperature_squared: as in `linear_kd_cross_entropy`.
        tail: as in `linear_kd_cross_entropy`.
        z_loss: as in `linear_kd_cross_entropy`.
        vocab_size: true vocabulary size; later columns are padding: no probability, zero gradient.
        tp_group: tensor-parallel group; None: unsharded.

    Returns:
        KDLoss [...], identical on every rank of the group; fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: bad sizes, types, scalars or targets, before any collective.
        RuntimeError: a second backward.

    Collectives:
        Forward one all-gather of [C, K + 6] per chunk; backward none. Memory: the gradient, and one
        chunk.
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
            f"labels {tuple(labels.shape)} must have the logits' leading shape "
            f"{tuple(logits.shape[:-1])}"
        )
    inputs = LossInputs(labels)
    check_inputs(inputs, target, spec, vocab_size=shard.vocab_size)
    if not torch.is_grad_enabled():  # inside an autograd function a leaf still requires grad
        logits = logits.detach()
    loss = SparseLoss(inputs, target, spec, shard, tp_group)
    total, ce, kd = _LogitsLoss.apply(logits, loss, shard)
    return KDLoss(total.view(labels.shape), ce.view(labels.shape), kd.view(labels.shape))


class _LogitsLoss(torch.autograd.Function):
    """Map logits [..., V/tp] to total, ce and kd, each [N]; only total is differentiable."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, loss: SparseLoss, shard: VocabShard
    ) -> tuple[Tensor, ...]:
        rows = logits.detach().reshape(-1, logits.shape[-1])
        total, ce, kd = rows.new_zeros((3, rows.shape[0]), dtype=compute_dtype(rows.dtype)).unbind()
        gradient = torch.zeros_like(rows) if logits.requires_grad else None
        size = chunk_size(None, shard.share, rows.shape[0], on_cuda=rows.is_cuda)
        for chunk, chunk_rows in split_logits(rows, shard, TokenChunks(rows.shape[0], 1, size)):
            token_values, state = loss.measure(chunk_rows, chunk)
            chunk.put(total, token_values.total)
            chunk.put(ce, token_values.reported["ce"])
            chunk.put(kd, token_values.reported["kd"])
            if gradient is not None:
                d_logits = loss.logit_gradient(chunk_rows, state, start=shard.start)
                gradient[chunk.part, : shard.valid] = d_logits.to(gradient.dtype)
        ctx.gradient, ctx.shape = gradient, logits.shape
        ctx.mark_non_differentiable(ce, kd)
        return total, ce, kd

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradient = ctx.gradient
        if gradient is None:
            raise RuntimeError(
                "backward through this loss a second time: its gradient was returned and is gone"
            )
        ctx.gradient = None
        scaled = gradient.mul_(upstream.unsqueeze(1).to(gradient.dtype))
        return scaled.view(ctx.shape), None, None
