"""The output head and its loss in one operator: logits exist for one chunk of tokens at a time, on either side.

Per chunk: logits = hidden @ weight^T, statistics of the rows (one small all-gather under tensor parallelism), losses, logit
gradient, gradients of hidden and weight. The schedules differ in when that happens and in what is kept:

    schedule    products   kept beside the inputs, in fp32                   upstream gradient     second backward
    save        3          all logits [N, V/tp]                              any                   no
    chunk       3          one chunk [C, V/tp], weight gradient [V/tp, H]    one value for all     no
    direct      3          one chunk; weight gradient in weight.main_grad    exactly 1             no
    recompute   4          one chunk; in the backward [N, slab of V/tp]      any                   yes
    auto        save where all logits are few (`SAVED_LOGITS_*`), else chunk, and recompute in a backward it cannot serve

All give the same gradients. N = S * B tokens, C of them in a chunk, H hidden, V/tp vocabulary rows on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_kd.head.chunked_head import SCHEDULES, HeadCall, HeadFunction, MakeLoss
from megatron_kd.head.logit_rows import ChunkRows
from megatron_kd.head.sizes import SAVED_LOGITS_CPU, SAVED_LOGITS_CUDA, chunk_size
from megatron_kd.head.token_chunks import TokenChunks
from megatron_kd.head.weight_gradient import takes_main_grad
from megatron_kd.losses.sparse_loss import HEALTH, TokenLoss
from megatron_kd.losses.spec import KDLoss, LossSpec, TokenTerms, check_inputs
from megatron_kd.parallel.collectives import Group, group_rank, group_size
from megatron_kd.parallel.vocab_shards import VocabShard, vocab_shard
from megatron_kd.targets.sparse import SparseTarget


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

    Formulas: `reference_kd_cross_entropy`; gradients: `losses/sparse_loss.py`.

    Args:
        hidden: [S, B, H] or [N, H], any float type. Without sequence_parallel replicated over `tp_group`; with it this
            rank's slice of S. Its gradient has the same layout and is complete: summed over the group on return.
        weight: [V/tp, H], this rank's rows in id order; rows past vocab_size are padding and get zero gradient.
        labels: [S, B] (or [N]) int, the full sequence, already shifted; -100 is ignored.
        target: SparseTarget [S, B, K], the full sequence, the same on every rank; None means alpha must be 0.
        loss_mask: [S, B] float weight of each token in `total`.
        vocab_size: true vocabulary size; None: every row is real.
        schedule: "auto", "save", "chunk", "direct" or "recompute", see the module. Where `weight` has a main_grad
            (megatron-core's DistributedDataParallel) its gradient is added there, by megatron-core's contract.
        chunk_tokens: tokens per chunk; None: from the shard's width (`targets.logits.chunk_size`).
    Returns:
        KDLoss [S, B], identical on every rank of the group; computed in fp32 (fp64 for fp64 inputs).
    Raises:
        ValueError: bad sizes, types, scalars or targets, before any collective. RuntimeError: a second backward, or an
        upstream gradient that the schedule cannot serve.
    Collectives: per chunk one all-gather of [C, K + 6] and a sum of the gradient of hidden (all-reduce, or reduce-scatter
        under sequence_parallel, which also gathers hidden); all but the first overlap with products.
    """
    spec = LossSpec(alpha, temperature, temperature_squared, tail, z_loss)
    options = HeadOptions(vocab_size, tp_group, sequence_parallel, schedule, chunk_tokens)
    return head_loss(hidden, weight, labels, target, spec, options, loss_mask=loss_mask)[0]


@dataclass(frozen=True)
class HeadOptions:
    """How hidden states and weight are laid out and the chunks walked over, see `linear_kd_cross_entropy`; health: also report
    the columns of `losses.rows.HEALTH`, which costs one more pass over each chunk."""

    vocab_size: int | None = None
    tp_group: Group = None
    sequence_parallel: bool = False
    schedule: str = "auto"
    chunk_tokens: int | None = None
    health: bool = False

    @property
    def slices(self) -> int:
        """Ranks that hold slices of the sequence."""
        return group_size(self.tp_group) if self.sequence_parallel else 1

    def plan(self, tokens: int, shard: VocabShard, *, on_cuda: bool) -> tuple[str, TokenChunks]:
        """The schedule, "save" in place of "auto" where all logits are few, and the chunks: alike on every rank."""
        few = tokens * shard.share <= (SAVED_LOGITS_CUDA if on_cuda else SAVED_LOGITS_CPU)
        size = chunk_size(self.chunk_tokens, shard.share, tokens, on_cuda=on_cuda)
        return "save" if few and self.schedule == "auto" else self.schedule, TokenChunks(
            tokens, self.slices, size
        )


class MakeTokenLoss(Protocol):
    """`TokenLoss`, or one that derives from it with some of its arguments given."""

    def __call__(
        self,
        rows: ChunkRows,
        labels: Tensor,
        weight: Tensor,
        target: SparseTarget | None,
        spec: LossSpec,
        shard: VocabShard,
        group: Group,
        *,
        terms: TokenTerms | None = None,
        health: bool = False,
    ) -> TokenLoss: ...


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    target: SparseTarget | None,
    spec: LossSpec,
    options: HeadOptions,
    *,
    loss_mask: Tensor | None = None,
    terms: TokenTerms | None = None,
    token_loss: MakeTokenLoss = TokenLoss,
) -> tuple[KDLoss, Tensor | None]:
    """`linear_kd_cross_entropy` with its scalars in one value, and the columns of `losses.rows.HEALTH` [..., 5] if asked for.

    terms: of each token, of the labels' shape; None: the spec's for all.
    """
    shard = check_head(hidden, weight, labels, options)
    check_inputs(labels, target, loss_mask, spec, vocab_size=shard.vocab_size, terms=terms)
    mask = token_weights(labels, loss_mask)
    flat = (terms or spec.terms()).map(Tensor.flatten)

    def make_loss(rows: ChunkRows, take: Callable[[Tensor], Tensor]) -> TokenLoss:
        chosen = None if target is None else target.flatten().map(take)
        each = flat.map(take)
        return token_loss(
            rows,
            take(labels.flatten()),
            take(mask),
            chosen,
            spec,
            shard,
            options.tp_group,
            terms=each,
            health=options.health,
        )

    return run_head(hidden, weight, labels, make_loss, shard, options)


def token_weights(labels: Tensor, loss_mask: Tensor | None) -> Tensor:
    """What each token counts [N]."""
    return (
        torch.ones_like(labels, dtype=torch.float32) if loss_mask is None else loss_mask
    ).flatten()


def check_head(hidden: Tensor, weight: Tensor, labels: Tensor, options: HeadOptions) -> VocabShard:
    """This rank's shard; ValueError for sizes and types that do not fit, before any collective."""
    if options.schedule not in SCHEDULES:
        raise ValueError(
            f"schedule must be one of {', '.join(SCHEDULES)}, not {options.schedule!r}"
        )
    group = options.tp_group
    shard = vocab_shard(
        weight.shape[0],
        rank=group_rank(group),
        size=group_size(group),
        vocab_size=options.vocab_size,
    )
    if weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} {hidden.dtype} and weight {tuple(weight.shape)} {weight.dtype} must end in the "
            "same width and have the same type"
        )
    expected = (hidden.shape[0] * options.slices, *hidden.shape[1:-1])
    if tuple(labels.shape) != expected:
        raise ValueError(
            f"labels {tuple(labels.shape)} must be {expected}: the full sequence of hidden {tuple(hidden.shape)}"
        )
    if options.schedule == "direct" and not takes_main_grad(weight):
        raise ValueError(
            'schedule="direct" adds to weight.main_grad, which must exist in fp32 (megatron-core\'s DistributedDataParallel makes it): '
            'use schedule="chunk"'
        )
    return shard


def run_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    make_loss: MakeLoss,
    shard: VocabShard,
    options: HeadOptions,
) -> tuple[KDLoss, Tensor | None]:
    """Any loss of a chunk's logits through the head: `make_loss` is called with each chunk. Inputs as checked by `check_head`."""
    schedule, chunks = options.plan(labels.numel(), shard, on_cuda=hidden.is_cuda)
    if not torch.is_grad_enabled():  # a parameter asks for its gradient even then
        hidden, weight = hidden.detach(), weight.detach()
    call = HeadCall(
        make_loss, shard, options.tp_group, chunks, schedule, len(HEALTH) if options.health else 0
    )
    total, ce, kd, extra = HeadFunction.apply(hidden.reshape(-1, hidden.shape[-1]), weight, call)
    loss = KDLoss(total.view(labels.shape), ce.view(labels.shape), kd.view(labels.shape))
    return loss, extra.view(*labels.shape, -1) if options.health else None
