"""The four ways to walk over the chunks of the output head, as one autograd function. See `losses/head.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_kd.head.logit_rows import ChunkRows, chunk_rows
from megatron_kd.head.output_weight import OutputWeight
from megatron_kd.head.sizes import buffer_width
from megatron_kd.head.token_chunks import HiddenChunks, TokenChunks
from megatron_kd.head.weight_gradient import WeightGradient, hand_over, takes_main_grad
from megatron_kd.losses.sparse_loss import RowLoss
from megatron_kd.parallel.collectives import Group
from megatron_kd.parallel.vocab_shards import VocabShard

SCHEDULES = ("auto", "save", "chunk", "direct", "recompute")


class ChunkLoss(Protocol):
    """The loss of one chunk: `losses.rows.TokenLoss`, `losses.dense_rows.DivergenceLoss`."""

    def loss(self) -> RowLoss:
        """[C] per token."""

    def gradient(self, rows: ChunkRows, *, start: int, upstream: Tensor | None = None) -> Tensor:
        """d(sum of upstream * total)/d(logits) [C, n] of the logits in `rows`, which are consumed; their first id is `start`."""


# (logits, the chunk of the sequence as a function that takes a tensor [N, ...] apart) -> its loss
MakeLoss = Callable[[ChunkRows, Callable[[Tensor], Tensor]], ChunkLoss]


@dataclass(frozen=True)
class HeadCall:
    """What one call of the head does not differentiate. health: columns of RowLoss.health."""

    make_loss: MakeLoss
    shard: VocabShard
    group: Group
    chunks: TokenChunks
    schedule: str
    health: int


class HeadFunction(torch.autograd.Function):
    """(hidden [n, H], weight [V/tp, H], call) -> total, ce, kd [N] and health [N, columns]; differentiable in total."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, call: HeadCall) -> tuple[Tensor, ...]:
        head, chunks = OutputWeight(weight, call.shard), call.chunks
        schedule = call.schedule if hidden.requires_grad or weight.requires_grad else "evaluate"
        eager = schedule in ("auto", "chunk", "direct")
        source = HiddenChunks(
            hidden.detach(), chunks, call.group, gradient=head.dtype if eager else None
        )
        d_weight = (
            WeightGradient(weight, call.shard, into_main=schedule == "direct") if eager else None
        )
        results = hidden.new_zeros((3, chunks.tokens), dtype=head.dtype)
        health = results.new_zeros((chunks.tokens, call.health))
        losses: list[ChunkLoss] = []
        kept: list[ChunkRows] = []
        buffer = None if schedule == "save" else head.new_buffer(chunks.largest)
        for part, x in source:
            rows = head.logits(x, head.new_buffer(len(x)) if buffer is None else buffer)
            loss = call.make_loss(rows, lambda full, part=part: chunks.take(full, part))  # type: ignore[misc]
            found = loss.loss()
            for row, values in zip(results, (found.total, found.ce, found.kd), strict=True):
                chunks.put(row, part, values)
            if found.health is not None:
                chunks.put(health, part, found.health)
            if d_weight is not None:
                d_logits = loss.gradient(rows, start=call.shard.start)
                source.give_back(part, head.hidden_gradient(d_logits))
                d_weight.add(head, d_logits, x)
            if schedule in ("auto", "save", "recompute"):
                losses.append(loss)
            if schedule == "save":
                kept.append(rows)
        ctx.call, ctx.losses, ctx.kept, ctx.weight_gradient = call, losses, kept, d_weight
        ctx.hidden_gradient = source.gradient() if eager else None
        ctx.save_for_backward(hidden, weight)
        total, ce, kd = results.unbind()
        ctx.mark_non_differentiable(ce, kd, health)
        return total, ce, kd, health

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        call, schedule = ctx.call, ctx.call.schedule
        d_hidden, d_weight, kept = ctx.hidden_gradient, ctx.weight_gradient, ctx.kept
        ctx.hidden_gradient = ctx.weight_gradient = ctx.kept = None
        scale = None
        if schedule == "recompute" or (
            d_hidden is not None and schedule == "auto" and not _same_for_all(upstream)
        ):
            d_hidden, d_weight = _by_slabs(hidden, weight, upstream, ctx.losses, call)
        elif schedule == "save" and kept is not None:
            d_hidden, d_weight = _from_kept(hidden, weight, upstream, ctx.losses, kept, call)
        elif d_hidden is None:
            raise RuntimeError(
                f'backward through this loss a second time: schedule="{schedule}" has handed its gradients out or used up its logits; '
                'use schedule="recompute"'
            )
        elif schedule == "direct":
            _must_be_one(upstream)
        elif not _same_for_all(upstream):
            raise RuntimeError(
                'schedule="chunk" formed its gradients in the forward for a sum of `total`: give per-token weights as '
                'loss_mask, or use schedule="save" or, with sparse targets, "recompute"'
            )
        else:
            scale = upstream.flatten()[0]
            d_hidden = d_hidden.mul_(scale)
        return d_hidden.to(hidden.dtype), hand_over(weight, d_weight, scale), None


def _from_kept(
    hidden: Tensor,
    weight: Tensor,
    upstream: Tensor,
    losses: list[ChunkLoss],
    kept: list[ChunkRows],
    call: HeadCall,
) -> tuple[Tensor, WeightGradient]:
    """The backward of "save": gradients in the place of the logits kept by the forward."""
    head, chunks = OutputWeight(weight, call.shard), call.chunks
    source = HiddenChunks(hidden.detach(), chunks, call.group, gradient=head.dtype)
    d_weight = WeightGradient(weight, call.shard, into_main=takes_main_grad(weight))
    for loss, (part, x) in zip(losses, source, strict=True):
        d_logits = loss.gradient(
            kept.pop(0), start=call.shard.start, upstream=chunks.take(upstream, part)
        )
        source.give_back(part, head.hidden_gradient(d_logits))
        d_weight.add(head, d_logits, x)
    return source.gradient(), d_weight


def _by_slabs(
    hidden: Tensor, weight: Tensor, upstream: Tensor, losses: list[ChunkLoss], call: HeadCall
) -> tuple[Tensor, WeightGradient]:
    """The backward of "recompute": all tokens' logits of one slab of the vocabulary at a time, multiplied again.

    Each row of the weight gets its gradient in one product, so no sum over chunks is held in fp32 beside it.
    """
    head, chunks, shard = OutputWeight(weight, call.shard), call.chunks, call.shard
    source = HiddenChunks(hidden.detach(), chunks, call.group, gradient=head.dtype)
    parts, states = zip(*source, strict=True)
    x = torch.cat(states) if len(states) > 1 else states[0]
    lengths = [len(state) for state in states]
    weights = [chunks.take(upstream, part) for part in parts]
    d_weight = WeightGradient(weight, shard, into_main=takes_main_grad(weight))
    d_x = torch.zeros(x.shape, dtype=head.dtype, device=x.device)
    slab = max(1, chunks.largest * shard.valid // len(x))  # as many logits as a chunk has
    buffer = torch.empty((len(x), buffer_width(slab)), dtype=head.dtype, device=x.device)
    for start in range(0, shard.valid, slab):
        columns = slice(start, min(start + slab, shard.valid))
        slab_head = head.slab(columns)
        rows = slab_head.logits(x, buffer)
        pieces = zip(losses, torch.split(rows.buffer, lengths), weights, strict=True)
        for loss, piece, given in pieces:
            found = loss.gradient(
                chunk_rows(piece, rows.valid, rows.gradient_dtype),
                start=shard.start + start,
                upstream=given,
            )
        d_logits = rows.buffer.view(found.dtype)[
            :, : rows.valid
        ]  # each piece's lies where its logits were
        d_x += slab_head.hidden_gradient(d_logits)
        d_weight.add_slab(slab_head, d_logits, x, start)
    for part, piece in zip(parts, torch.split(d_x, lengths), strict=True):
        source.give_back(part, piece)
    return source.gradient(), d_weight


def _same_for_all(upstream: Tensor) -> bool:
    """Whether every token has the same upstream gradient. The gradient of a sum says so in its strides, without a read."""
    if all(stride == 0 for stride in upstream.stride()) or upstream.numel() == 1:
        return True
    return upstream.is_cpu and bool((upstream == upstream.flatten()[0]).all())


def _must_be_one(upstream: Tensor) -> None:
    if upstream.is_cpu and bool((upstream != 1).any()):
        raise RuntimeError(
            'schedule="direct" has already added its gradients to main_grad for the plain sum of `total`: scale the loss through '
            'loss_mask, or use schedule="chunk"'
        )
    if upstream.is_cuda:
        torch._assert_async((upstream == 1).all())
