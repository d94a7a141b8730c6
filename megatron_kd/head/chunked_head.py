"""Run a loss through the output head in chunks, as one autograd function.

Per chunk: logits = hidden @ weight^T, the loss of the logits, its logit gradient, and the gradients
of hidden and weight. Logits exist for one chunk of tokens at a time unless the memory strategy
keeps them (`head/options.py` lists the strategies).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_kd.head.chunk_loss import ChunkLoss
from megatron_kd.head.logit_rows import ChunkRows, chunk_rows
from megatron_kd.head.options import HeadOptions
from megatron_kd.head.output_weight import OutputWeight
from megatron_kd.head.sizes import buffer_width
from megatron_kd.head.token_chunks import HiddenChunks, TokenChunks
from megatron_kd.head.weight_gradient import WeightGradient, deliver, has_main_grad
from megatron_kd.parallel.collectives import Group
from megatron_kd.parallel.vocab_shards import VocabShard

# Strategies that form the gradients during the forward.
EAGER = ("auto", "chunk", "direct")


def run_head(
    hidden: Tensor,
    weight: Tensor,
    loss: ChunkLoss[Any],
    shard: VocabShard,
    options: HeadOptions,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a loss of hidden @ weight^T, without the logits of all tokens.

    Args:
        hidden: [S, B, H] or [N, H], or this rank's slice of S under sequence parallelism; checked
            by `check_head`. Its gradient is complete: summed over the group.
        weight: [V/tp, H].
        loss: computes the values of each chunk.
        shard: from `check_head`.
        options: layout and memory strategy.

    Returns:
        The loss's total [S, B] (or [N]) of the full sequence, the only differentiable value, and
        its reported values by name. In fp32 (fp64 for fp64 inputs), identical on every rank.

    Raises:
        RuntimeError: a second backward, or an upstream gradient that the strategy cannot serve.

    Collectives:
        Those of `loss` per chunk, and a sum of the gradient of hidden: all-reduce, or
        reduce-scatter under sequence parallelism, which also gathers hidden. All but the first
        overlap with products.
    """
    shape, on_cuda = options.token_shape(hidden), hidden.is_cuda
    strategy = options.choose_strategy(
        shape.numel(), shard, on_cuda=on_cuda, recomputable=loss.recomputable
    )
    chunks = options.chunks(shape.numel(), shard, on_cuda=on_cuda)
    if not torch.is_grad_enabled():  # inside an autograd function a parameter still requires grad
        hidden, weight = hidden.detach(), weight.detach()
    layout = _Layout(shard, options.tp_group, chunks)
    states = hidden.reshape(-1, hidden.shape[-1])
    total, *reported = _ChunkedHead.apply(states, weight, loss, layout, strategy)
    return total.view(shape), {
        name: values.view(shape) for name, values in zip(loss.reported, reported, strict=True)
    }


@dataclass(frozen=True)
class _Layout:
    """Describe how the vocabulary and the tokens are cut."""

    shard: VocabShard
    group: Group
    chunks: TokenChunks


class _ChunkedHead(torch.autograd.Function):
    """Map hidden states [n, H] and weight [V/tp, H] to the loss's total and reported values [N].

    Only total is differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        loss: ChunkLoss[Any],
        layout: _Layout,
        strategy: str,
    ) -> tuple[Tensor, ...]:
        shard, chunks = layout.shard, layout.chunks
        head = OutputWeight(weight, shard)
        differentiate = hidden.requires_grad or weight.requires_grad
        eager = differentiate and strategy in EAGER
        save = differentiate and strategy == "save"
        source = HiddenChunks(
            hidden.detach(), chunks, layout.group, gradient_dtype=head.dtype if eager else None
        )
        d_weight = WeightGradient(weight, shard, into_main=strategy == "direct") if eager else None
        results = hidden.new_zeros((1 + len(loss.reported), chunks.tokens), dtype=head.dtype)
        states: list[Any] = []
        saved: list[ChunkRows] = []
        buffer = None if save else head.new_buffer(chunks.largest)
        for chunk, x in source:
            rows = head.logits(x, head.new_buffer(len(x)) if buffer is None else buffer)
            token_values, state = loss.measure(rows, chunk)
            chunk.put(results[0], token_values.total)
            for name, result in zip(loss.reported, results[1:], strict=True):
                chunk.put(result, token_values.reported[name])
            if d_weight is not None:
                d_logits = loss.logit_gradient(rows, state, start=shard.start)
                source.add_gradient(chunk, head.hidden_gradient(d_logits))
                d_weight.add(head, d_logits, x)
            if differentiate and strategy in ("auto", "save", "recompute"):
                states.append(state)
            if save:
                saved.append(rows)
        ctx.loss, ctx.layout, ctx.strategy = loss, layout, strategy
        ctx.states, ctx.saved, ctx.weight_gradient = states, saved, d_weight
        ctx.hidden_gradient = source.gradient() if eager else None
        ctx.save_for_backward(hidden, weight)
        total, *reported = results.unbind()
        ctx.mark_non_differentiable(*reported)
        return total, *reported

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        strategy: str = ctx.strategy
        d_hidden, d_weight, saved = ctx.hidden_gradient, ctx.weight_gradient, ctx.saved
        ctx.hidden_gradient = ctx.weight_gradient = ctx.saved = None
        scale = None
        if strategy == "recompute" or (
            d_hidden is not None and strategy == "auto" and not _is_uniform(upstream)
        ):
            d_hidden, d_weight = _gradients_by_slabs(hidden, weight, upstream, ctx)
        elif strategy == "save" and saved is not None:
            d_hidden, d_weight = _gradients_from_saved(hidden, weight, upstream, saved, ctx)
        elif d_hidden is None:
            raise RuntimeError(
                f'backward through this loss a second time: schedule="{strategy}" has returned '
                'its gradients or used up its logits; use schedule="recompute"'
            )
        elif strategy == "direct":
            _require_ones(upstream)
        elif not _is_uniform(upstream):
            raise RuntimeError(
                'schedule="chunk" formed its gradients in the forward for a sum of `total`: give '
                'per-token weights as loss_mask, or use schedule="save" or, with sparse targets, '
                '"recompute"'
            )
        else:
            scale = upstream.flatten()[0]
            d_hidden = d_hidden.mul_(scale)
        return d_hidden.to(hidden.dtype), deliver(weight, d_weight, scale), None, None, None


def _gradients_from_saved(
    hidden: Tensor, weight: Tensor, upstream: Tensor, saved: list[ChunkRows], ctx: Any
) -> tuple[Tensor, WeightGradient]:
    """Return the gradients of "save", formed in the memory of the logits kept by the forward."""
    loss: ChunkLoss[Any] = ctx.loss
    layout: _Layout = ctx.layout
    shard = layout.shard
    head = OutputWeight(weight, shard)
    source = HiddenChunks(hidden.detach(), layout.chunks, layout.group, gradient_dtype=head.dtype)
    d_weight = WeightGradient(weight, shard, into_main=has_main_grad(weight))
    for state, (chunk, x) in zip(ctx.states, source, strict=True):
        d_logits = loss.logit_gradient(
            saved.pop(0), state, start=shard.start, upstream=chunk.take(upstream)
        )
        source.add_gradient(chunk, head.hidden_gradient(d_logits))
        d_weight.add(head, d_logits, x)
    return source.gradient(), d_weight


def _gradients_by_slabs(
    hidden: Tensor, weight: Tensor, upstream: Tensor, ctx: Any
) -> tuple[Tensor, WeightGradient]:
    """Return the gradients of "recompute": all tokens' logits of one vocabulary slab at a time.

    Each row of the weight gets its gradient in one product, so that no sum over chunks is held in
    fp32 beside it.
    """
    loss: ChunkLoss[Any] = ctx.loss
    layout: _Layout = ctx.layout
    shard = layout.shard
    head = OutputWeight(weight, shard)
    source = HiddenChunks(hidden.detach(), layout.chunks, layout.group, gradient_dtype=head.dtype)
    chunks, chunk_states = zip(*source, strict=True)
    x = torch.cat(chunk_states) if len(chunk_states) > 1 else chunk_states[0]
    lengths = [len(states) for states in chunk_states]
    upstreams = [chunk.take(upstream) for chunk in chunks]
    d_weight = WeightGradient(weight, shard, into_main=has_main_grad(weight))
    d_x = torch.zeros(x.shape, dtype=head.dtype, device=x.device)
    slab = max(1, layout.chunks.largest * shard.valid // len(x))  # as many logits as a chunk has
    buffer = torch.empty((len(x), buffer_width(slab)), dtype=head.dtype, device=x.device)
    for start in range(0, shard.valid, slab):
        slab_head = head.slab(slice(start, min(start + slab, shard.valid)))
        rows = slab_head.logits(x, buffer)
        dtype = rows.buffer.dtype
        chunk_buffers = torch.split(rows.buffer, lengths)
        for state, part, upstream_part in zip(ctx.states, chunk_buffers, upstreams, strict=True):
            dtype = loss.logit_gradient(
                chunk_rows(part, rows.valid, rows.gradient_dtype),
                state,
                start=shard.start + start,
                upstream=upstream_part,
            ).dtype
        # Each chunk's gradient is in the memory of its logits, possibly in a narrower type.
        d_logits = rows.buffer.view(dtype)[:, : rows.valid]
        d_x += slab_head.hidden_gradient(d_logits)
        d_weight.add_slab(slab_head, d_logits, x, start)
    for chunk, d_states in zip(chunks, torch.split(d_x, lengths), strict=True):
        source.add_gradient(chunk, d_states)
    return source.gradient(), d_weight


def _is_uniform(upstream: Tensor) -> bool:
    """Return True if every token has the same upstream gradient.

    The gradient of a sum is recognised by its strides, without reading values. On a GPU any other
    gradient counts as not uniform, because reading it would stall the step.
    """
    if all(stride == 0 for stride in upstream.stride()) or upstream.numel() == 1:
        return True
    return upstream.is_cpu and bool((upstream == upstream.flatten()[0]).all())


def _require_ones(upstream: Tensor) -> None:
    """Raise RuntimeError unless every upstream gradient is 1; asynchronous on a GPU."""
    if upstream.is_cpu and bool((upstream != 1).any()):
        raise RuntimeError(
            'schedule="direct" has already added its gradients to main_grad for the plain sum of '
            '`total`: scale the loss through loss_mask, or use schedule="chunk"'
        )
    if upstream.is_cuda:
        torch._assert_async((upstream == 1).all())
