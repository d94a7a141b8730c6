"""Describe the layout of the head's inputs and choose its chunks and its memory strategy.

The memory strategies differ in when gradients are formed and in what is kept for the backward:

    strategy    products   kept beside the inputs, in fp32                upstream gradient   second
                                                                                            backward
    save        3          all logits [N, V/tp]                           any                 no
    chunk       3          one chunk [C, V/tp], weight gradient           one value for all   no
                           [V/tp, H]
    direct      3          one chunk; weight gradient is added to         exactly 1           no
                           weight.main_grad
    recompute   4          one chunk; in the backward [N, slab of V/tp]   any                 yes
    auto        save if all logits are few (`SAVED_LOGITS_*` of head/sizes.py), else chunk, and
                recompute in a backward that chunk cannot serve

All give the same gradients. Shapes: N = S * B tokens, C of them in a chunk, H hidden size, V/tp
vocabulary rows on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kd.head import sizes
from megatron_kd.head.token_chunks import TokenChunks
from megatron_kd.head.weight_gradient import has_main_grad
from megatron_kd.parallel.collectives import Group, group_rank, group_size
from megatron_kd.parallel.vocab_shards import VocabShard, vocab_shard

MEMORY_STRATEGIES = ("auto", "save", "chunk", "direct", "recompute")


@dataclass(frozen=True)
class HeadOptions:
    """Describe how hidden states and weight are laid out and how the head iterates over them.

    Attributes:
        vocab_size: true vocabulary size; None: every row of the weight is real.
        tp_group: tensor-parallel group; None: unsharded.
        sequence_parallel: True if hidden states are this rank's slice of the sequence.
        strategy: memory strategy, see the module.
        chunk_tokens: tokens per chunk; None: from the width of the vocabulary shard.
    """

    vocab_size: int | None = None
    tp_group: Group = None
    sequence_parallel: bool = False
    strategy: str = "auto"
    chunk_tokens: int | None = None

    @property
    def slices(self) -> int:
        """Return the number of ranks that hold slices of the sequence."""
        return group_size(self.tp_group) if self.sequence_parallel else 1

    def token_shape(self, hidden: Tensor) -> torch.Size:
        """Return the shape [S, B] or [N] of the full sequence of `hidden`."""
        return torch.Size((hidden.shape[0] * self.slices, *hidden.shape[1:-1]))

    def chunks(self, tokens: int, shard: VocabShard, *, on_cuda: bool) -> TokenChunks:
        """Return the chunks of `tokens` tokens, the same on every rank."""
        size = sizes.chunk_size(self.chunk_tokens, shard.share, tokens, on_cuda=on_cuda)
        return TokenChunks(tokens, self.slices, size)

    def choose_strategy(
        self, tokens: int, shard: VocabShard, *, on_cuda: bool, recomputable: bool
    ) -> str:
        """Return the memory strategy, the same on every rank.

        Args:
            tokens: number of tokens of the full sequence.
            shard: this rank's part of the vocabulary.
            on_cuda: True for a GPU, False for a CPU.
            recomputable: see `ChunkLoss`.
        """
        if self.strategy != "auto":
            return self.strategy
        limit = sizes.SAVED_LOGITS_CUDA if on_cuda else sizes.SAVED_LOGITS_CPU
        if tokens * shard.share <= limit:
            return "save"
        return "auto" if recomputable else "chunk"


def check_head(hidden: Tensor, weight: Tensor, labels: Tensor, options: HeadOptions) -> VocabShard:
    """Return this rank's vocabulary shard after checking the head's inputs.

    Args:
        hidden: [S, B, H] or [N, H], or this rank's slice of S under sequence parallelism.
        weight: [V/tp, H], this rank's rows in id order.
        labels: [S, B] (or [N]) of the full sequence.
        options: layout and memory strategy.

    Raises:
        ValueError: sizes or types do not fit, before any collective.
    """
    if options.strategy not in MEMORY_STRATEGIES:
        raise ValueError(
            f"schedule must be one of {', '.join(MEMORY_STRATEGIES)}, not {options.strategy!r}"
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
            f"hidden {tuple(hidden.shape)} {hidden.dtype} and weight {tuple(weight.shape)} "
            f"{weight.dtype} must end in the same width and have the same type"
        )
    expected = options.token_shape(hidden)
    if labels.shape != expected:
        raise ValueError(
            f"labels {tuple(labels.shape)} must be {tuple(expected)}: the full sequence of hidden "
            f"{tuple(hidden.shape)}"
        )
    if options.strategy == "direct" and not has_main_grad(weight):
        raise ValueError(
            'schedule="direct" adds to weight.main_grad, which must exist in fp32 '
            "(megatron-core's DistributedDataParallel makes it): "
            'use schedule="chunk"'
        )
    return shard
