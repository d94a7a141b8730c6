"""Logits of one chunk of tokens, in fp32 or fp64, in a buffer that is used again for the next one."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from megatron_kd.head.logit_rows import MASKED, ChunkRows, chunk_rows
from megatron_kd.head.sizes import buffer_width
from megatron_kd.head.token_chunks import HiddenChunks, TokenChunks
from megatron_kd.parallel.collectives import Group
from megatron_kd.parallel.vocab_shards import VocabShard


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays, everything else is computed in fp32: bf16 logits cost 20 % of the gradient near the teacher."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class OutputWeight:
    """This rank's rows of the output weight [V/tp, H], ready for products in fp32 (fp64 for fp64 weights).

    A GPU multiplies bf16 by bf16 into fp32; a CPU would round, so there the valid rows are widened once.
    """

    def __init__(self, weight: Tensor, shard: VocabShard) -> None:
        self.shard = shard
        self.dtype = compute_dtype(weight.dtype)
        valid = weight.detach()[: shard.valid]
        self.narrow = valid.is_cuda and valid.dtype != self.dtype
        self.rows = valid if self.narrow else valid.to(self.dtype)

    def slab(self, part: slice) -> OutputWeight:
        """The same for some of the rows."""
        slab = copy(self)
        slab.rows = self.rows[part]
        count = part.stop - part.start
        slab.shard = replace(
            self.shard, start=self.shard.start + part.start, valid=count, rows=count
        )
        return slab

    def new_buffer(self, tokens: int) -> Tensor:
        """Uninitialised [tokens, W] for `logits`."""
        return self.rows.new_empty((tokens, buffer_width(self.shard.valid)), dtype=self.dtype)

    def logits(self, hidden: Tensor, buffer: Tensor) -> ChunkRows:
        """hidden [C, H] -> its logits, in the first C rows of `buffer`."""
        buffer = buffer[: hidden.shape[0]]
        out = buffer[:, : self.shard.valid]
        if self.narrow:
            torch.mm(hidden, self.rows.t(), out_dtype=self.dtype, out=out)
        else:
            torch.mm(hidden.to(self.dtype), self.rows.t(), out=out)
        return chunk_rows(buffer, self.shard.valid, gradient_dtype=self.rows.dtype)

    def hidden_gradient(self, logit_gradient: Tensor) -> Tensor:
        """[C, n] -> this rank's part of the gradient of hidden, [C, H] in fp32 (fp64)."""
        if self.narrow:
            return torch.mm(logit_gradient.to(self.rows.dtype), self.rows, out_dtype=self.dtype)
        return logit_gradient @ self.rows

    def add_weight_gradient_(
        self, gradient: Tensor, logit_gradient: Tensor, hidden: Tensor, *, first: bool = False
    ) -> None:
        """gradient [V/tp, H] (fp32, fp64) += logit_gradient^T hidden, on the valid rows; `first` overwrites what is there."""
        valid = gradient[: self.shard.valid]
        beta = 0.0 if first else 1.0
        if self.narrow:
            transposed = logit_gradient.to(hidden.dtype).t()
            torch.addmm(valid, transposed, hidden, out_dtype=gradient.dtype, beta=beta, out=valid)
        else:
            valid.addmm_(logit_gradient.t(), hidden.to(gradient.dtype), beta=beta)


Chunks = Iterator[tuple[slice, ChunkRows]]


def linear_logits(
    states: Tensor, weight: Tensor, shard: VocabShard, chunks: TokenChunks, group: Group
) -> Chunks:
    """Each chunk and its logits, always in the same buffer. states: [n, H] as in `HiddenChunks`. No gradient."""
    head = OutputWeight(weight, shard)
    buffer = head.new_buffer(chunks.largest)
    for part, x in HiddenChunks(states.detach(), chunks, group):
        yield part, head.logits(x, buffer)


def given_logits(logits: Tensor, shard: VocabShard, chunks: TokenChunks) -> Chunks:
    """Each chunk of logits [N, V/tp] that exist already, copied in fp32 (fp64 stays), always into the same buffer."""
    buffer = logits.new_empty(
        (chunks.largest, buffer_width(shard.valid)), dtype=compute_dtype(logits.dtype)
    )
    for part in chunks:
        chunk = buffer[: part.stop - part.start]
        chunk[:, : shard.valid] = logits[part, : shard.valid]
        yield (
            part,
            chunk_rows(chunk.clamp_(min=MASKED), shard.valid),
        )  # masked-out ids come as -inf
