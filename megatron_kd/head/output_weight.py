"""Multiply hidden states by the output weight, in fp32 or fp64, into a reused buffer of logits."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from megatron_kd.head.logit_rows import MASKED, ChunkRows, chunk_rows
from megatron_kd.head.sizes import buffer_width
from megatron_kd.head.token_chunks import Chunk, HiddenChunks, TokenChunks
from megatron_kd.parallel.collectives import Group
from megatron_kd.parallel.vocab_shards import VocabShard


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of logits: fp64 for fp64 inputs, else fp32.

    With bf16 logits 20 % of the gradient is lost once the student is close to the teacher.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


class OutputWeight:
    """Multiply by this rank's rows of the output weight [V/tp, H] in fp32 (fp64 for fp64 weights).

    A GPU multiplies bf16 by bf16 into fp32. A CPU would round the result to bf16, so there the
    valid rows are converted once.

    Attributes:
        shard: this rank's part of the vocabulary.
        dtype: type of the logits.
        narrow: True if the products take the weight in a 2-byte type.
        rows: [n, H], the valid rows in the type that the products take.
    """

    def __init__(self, weight: Tensor, shard: VocabShard) -> None:
        self.shard = shard
        self.dtype = compute_dtype(weight.dtype)
        valid = weight.detach()[: shard.valid]
        self.narrow = valid.is_cuda and valid.dtype != self.dtype
        self.rows = valid if self.narrow else valid.to(self.dtype)

    def slab(self, columns: slice) -> OutputWeight:
        """Return the same for some of the rows."""
        slab = copy(self)
        slab.rows = self.rows[columns]
        count = columns.stop - columns.start
        slab.shard = replace(
            self.shard, start=self.shard.start + columns.start, valid=count, rows=count
        )
        return slab

    def new_buffer(self, tokens: int) -> Tensor:
        """Return uninitialised memory [tokens, W] for `logits`."""
        return self.rows.new_empty((tokens, buffer_width(self.shard.valid)), dtype=self.dtype)

    def logits(self, states: Tensor, buffer: Tensor) -> ChunkRows:
        """Return the logits of hidden states [C, H], in the first C rows of `buffer`."""
        buffer = buffer[: states.shape[0]]
        out = buffer[:, : self.shard.valid]
        if self.narrow:
            torch.mm(states, self.rows.t(), out_dtype=self.dtype, out=out)
        else:
            torch.mm(states.to(self.dtype), self.rows.t(), out=out)
        return chunk_rows(buffer, self.shard.valid, gradient_dtype=self.rows.dtype)

    def hidden_gradient(self, logit_gradient: Tensor) -> Tensor:
        """Return this rank's part [C, H] of the gradient of hidden, from [C, n], in `dtype`."""
        if self.narrow:
            return torch.mm(logit_gradient.to(self.rows.dtype), self.rows, out_dtype=self.dtype)
        return logit_gradient @ self.rows

    def add_weight_gradient_(
        self, gradient: Tensor, logit_gradient: Tensor, states: Tensor, *, overwrite: bool
    ) -> None:
        """Add logit_gradient^T states to the valid rows of `gradient`.

        Args:
            gradient: [V/tp, H] in fp32 (fp64), changed in place.
            logit_gradient: [C, n].
            states: [C, H].
            overwrite: True if the present content of `gradient` is ignored.
        """
        valid = gradient[: self.shard.valid]
        beta = 0.0 if overwrite else 1.0
        if self.narrow:
            transposed = logit_gradient.to(states.dtype).t()
            torch.addmm(valid, transposed, states, out_dtype=gradient.dtype, beta=beta, out=valid)
        else:
            valid.addmm_(logit_gradient.t(), states.to(gradient.dtype), beta=beta)


LogitChunks = Iterator[tuple[Chunk, ChunkRows]]


def linear_logits(
    states: Tensor, weight: Tensor, shard: VocabShard, chunks: TokenChunks, group: Group
) -> LogitChunks:
    """Yield each chunk and its logits, always in the same buffer, without a gradient.

    Args:
        states: [n, H], as in `HiddenChunks`.
        weight: [V/tp, H].
        shard: this rank's part of the vocabulary.
        chunks: how the tokens are cut.
        group: tensor-parallel group.

    Collectives:
        Under sequence parallelism one all-gather of hidden states per chunk.
    """
    head = OutputWeight(weight, shard)
    buffer = head.new_buffer(chunks.largest)
    for chunk, chunk_states in HiddenChunks(states.detach(), chunks, group):
        yield chunk, head.logits(chunk_states, buffer)


def split_logits(logits: Tensor, shard: VocabShard, chunks: TokenChunks) -> LogitChunks:
    """Yield each chunk of existing logits [N, V/tp], copied in fp32 (fp64) to the same buffer."""
    buffer = logits.new_empty(
        (chunks.largest, buffer_width(shard.valid)), dtype=compute_dtype(logits.dtype)
    )
    for chunk in chunks:
        values = logits[chunk.part, : shard.valid]
        rows = buffer[: len(values)]
        rows[:, : shard.valid] = values
        # Ids that a caller has masked out come as -inf.
        yield chunk, chunk_rows(rows.clamp_(min=MASKED), shard.valid)
