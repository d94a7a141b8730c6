"""The output head and its loss in one operator: logits exist for one chunk of tokens at a time, on either side.

Forward, per chunk: logits = hidden @ weight^T, row statistics (one all-gather under tensor parallelism), losses. The
schedules differ in when gradients are formed:

    chunk       in the forward, from the logits at hand: three products per chunk, but the gradients are for an upstream
                gradient that is the same for every token (a plain sum, as the training objective takes).
    recompute   in the backward, from logits multiplied again: four products, any upstream gradient.
    auto        chunk, falling back to recompute in a backward that chunk cannot serve.

Shapes: N = S * B tokens, H hidden, V/tp vocabulary rows on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_kd.losses.rows import ChunkLoss
from megatron_kd.losses.types import KDLoss, LossSpec, check_inputs
from megatron_kd.parallel.collectives import Group, all_reduce_sum_, gather_sequence, group_rank, group_size, scatter_sequence_sum
from megatron_kd.parallel.shards import VocabShard, vocab_shard
from megatron_kd.targets.logits import OutputWeight, chunk_size
from megatron_kd.targets.sparse import SparseTarget

SCHEDULES = ("auto", "chunk", "recompute")


def linear_kd_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    target: SparseTarget | None,
    *,
    loss_mask: Tensor | None = None,
    alpha: float,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    tail: str = "renormalize",
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    tp_group: Group = None,
    sequence_parallel: bool = False,
    schedule: str = "auto",
    chunk_tokens: int | None = None,
) -> KDLoss:
    """Cross-entropy and sparse distillation loss of `hidden @ weight.T`, vocabulary-parallel, without full logits.

    Formulas: `reference_kd_cross_entropy`; gradients: `losses/rows.py`.

    Args:
        hidden: [S, B, H] or [N, H], any float type. Without sequence_parallel replicated over `tp_group`; with it this
            rank's slice of S. Its gradient has the same layout and is complete: summed over the group on return.
        weight: [V/tp, H], this rank's rows in id order; rows past vocab_size are padding and get zero gradient.
        labels: [S, B] (or [N]) int, the full sequence, already shifted; -100 is ignored.
        target: SparseTarget [S, B, K], the full sequence, the same on every rank; None means alpha must be 0.
        loss_mask: [S, B] float weight of each token in `total`.
        vocab_size: true vocabulary size; None: every row is real.
        schedule: "auto", "chunk" or "recompute", see the module.
        chunk_tokens: tokens per chunk; None: from the shard's width (`targets.logits.chunk_size`).
    Returns:
        KDLoss [S, B], identical on every rank of the group; computed in fp32 (fp64 for fp64 inputs).
    Raises:
        ValueError: bad sizes, types, scalars or targets, before any collective. RuntimeError: a second backward, or an
        upstream gradient that differs between tokens under schedule="chunk".
    Collectives: per chunk one all-gather of [C, K + 6]; once per call a sum of the gradient of hidden (all-reduce, or
        reduce-scatter under sequence_parallel, which also gathers hidden once).
    """
    spec = LossSpec(alpha, temperature, temperature_squared, tail, z_loss)
    loss, _ = head_loss(
        hidden,
        weight,
        labels,
        target,
        spec,
        loss_mask=loss_mask,
        vocab_size=vocab_size,
        tp_group=tp_group,
        sequence_parallel=sequence_parallel,
        schedule=schedule,
        chunk_tokens=chunk_tokens,
    )
    return loss


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    target: SparseTarget | None,
    spec: LossSpec,
    *,
    loss_mask: Tensor | None = None,
    vocab_size: int | None = None,
    tp_group: Group = None,
    sequence_parallel: bool = False,
    schedule: str = "auto",
    chunk_tokens: int | None = None,
    health: bool = False,
) -> tuple[KDLoss, Tensor | None]:
    """`linear_kd_cross_entropy` with its scalars in one value, and the columns of `losses.rows.HEALTH` [..., 5] if asked for."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}")
    size = group_size(tp_group)
    shard = vocab_shard(weight.shape[0], rank=group_rank(tp_group), size=size, vocab_size=vocab_size)
    if weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} {hidden.dtype} and weight {tuple(weight.shape)} {weight.dtype} must end in the "
            "same width and have the same type"
        )
    split = size if sequence_parallel else 1
    expected = (hidden.shape[0] * split, *hidden.shape[1:-1])
    if tuple(labels.shape) != expected:
        raise ValueError(f"labels {tuple(labels.shape)} must be {expected}: the full sequence of hidden {tuple(hidden.shape)}")
    check_inputs(labels, target, loss_mask, spec, vocab_size=shard.vocab_size)
    chunk_tokens = chunk_size(chunk_tokens, shard.valid, labels.numel(), on_cuda=hidden.is_cuda)
    if not torch.is_grad_enabled():  # a parameter asks for its gradient even then
        hidden, weight = hidden.detach(), weight.detach()
    call = _Call(spec, shard, tp_group, sequence_parallel, schedule, chunk_tokens, health)
    flat_mask = torch.ones_like(labels, dtype=torch.float32) if loss_mask is None else loss_mask
    total, ce, kd, extra = _Head.apply(  # type: ignore[no-untyped-call]
        hidden, weight, flat_mask.reshape(-1), labels.reshape(-1), target and target.flatten(), call
    )
    loss = KDLoss(total.view(labels.shape), ce.view(labels.shape), kd.view(labels.shape))
    return loss, extra.view(*labels.shape, -1) if health else None


@dataclass(frozen=True)
class _Call:
    """What one call of the head does not differentiate."""

    spec: LossSpec
    shard: VocabShard
    group: Group
    sequence_parallel: bool
    schedule: str
    chunk_tokens: int
    health: bool


@dataclass
class _Pass:
    """Results of one walk over the chunks: losses per token [N], gradients in the layout of the inputs."""

    total: Tensor
    ce: Tensor
    kd: Tensor
    health: Tensor
    hidden_gradient: Tensor | None
    weight_gradient: Tensor | None


def _walk(
    hidden: Tensor, weight: Tensor, token_weight: Tensor, labels: Tensor, target: SparseTarget | None, call: _Call, *, gradient: bool
) -> _Pass:
    """All chunks once, through one buffer; with `gradient` also both gradients, for d(sum of total) with `token_weight`."""
    head = OutputWeight(weight, call.shard)
    full = gather_sequence(hidden, call.group) if call.sequence_parallel else hidden
    rows = full.reshape(-1, full.shape[-1])
    tokens = rows.shape[0]
    size = call.chunk_tokens
    buffer = head.new_buffer(size)
    losses, healths = buffer.new_zeros((3, tokens)), []
    d_rows = buffer.new_empty(rows.shape) if gradient else None
    d_weight = buffer.new_zeros(weight.shape) if gradient else None
    for start in range(0, tokens, size):
        part = slice(start, min(start + size, tokens))
        x = rows[part]
        logits = head.logits_into(buffer[: x.shape[0]], x)
        rows_of = target.rows(part.start, part.stop) if target is not None else None
        chunk = ChunkLoss(logits, labels[part], token_weight[part], rows_of, call.spec, call.shard, call.group, health=call.health)
        loss = chunk.loss()
        losses[0, part], losses[1, part], losses[2, part] = loss.total, loss.ce, loss.kd
        if loss.health is not None:
            healths.append(loss.health)
        if d_rows is not None and d_weight is not None:
            d_logits = chunk.gradient()
            d_rows[part] = head.hidden_gradient(d_logits)
            head.add_weight_gradient_(d_weight, d_logits, x)
            del d_logits
        del chunk  # its buffers must not outlive it into the next one
    if d_rows is not None:
        d_rows = d_rows.view(full.shape)
        d_rows = scatter_sequence_sum(d_rows, call.group) if call.sequence_parallel else all_reduce_sum_(d_rows, call.group)
    health = torch.cat(healths) if healths else losses.new_empty((tokens, 0))
    return _Pass(losses[0], losses[1], losses[2], health, d_rows, d_weight)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, token_weight: Tensor, labels: Tensor, target: SparseTarget | None, call: _Call
    ) -> tuple[Tensor, ...]:
        needed = hidden.requires_grad or weight.requires_grad
        eager = needed and call.schedule != "recompute"
        done = _walk(hidden.detach(), weight, token_weight, labels, target, call, gradient=eager)
        ctx.call, ctx.target, ctx.used = call, target, False
        ctx.hidden_gradient, ctx.weight_gradient = done.hidden_gradient, done.weight_gradient
        ctx.save_for_backward(hidden, weight, token_weight, labels)
        ctx.mark_non_differentiable(done.ce, done.kd, done.health)
        return done.total, done.ce, done.kd, done.health

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, token_weight, labels = ctx.saved_tensors
        if ctx.used:
            raise RuntimeError("backward through this loss a second time: its gradients were handed out and are gone")
        ctx.used = True
        d_hidden, d_weight = ctx.hidden_gradient, ctx.weight_gradient
        ctx.hidden_gradient = ctx.weight_gradient = None
        if d_hidden is not None and _same_for_all(upstream, call := ctx.call):
            scale = upstream.reshape(-1)[0]
            d_hidden, d_weight = d_hidden.mul_(scale), d_weight.mul_(scale)
        else:
            call = ctx.call
            if call.schedule == "chunk":
                raise RuntimeError(
                    'schedule="chunk" formed its gradients in the forward for a sum of `total`: give per-token weights as '
                    'loss_mask, or use schedule="recompute"'
                )
            again = _walk(hidden, weight, token_weight.to(upstream.dtype) * upstream, labels, ctx.target, call, gradient=True)
            d_hidden, d_weight = again.hidden_gradient, again.weight_gradient
        assert d_hidden is not None and d_weight is not None
        return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), None, None, None, None


def _same_for_all(upstream: Tensor, call: _Call) -> bool:
    """Whether every token has the same upstream gradient. The gradient of a sum says so in its strides, without a read."""
    if all(stride == 0 for stride in upstream.stride()) or upstream.numel() == 1:
        return True
    return upstream.is_cpu and bool((upstream == upstream.flatten()[0]).all())
