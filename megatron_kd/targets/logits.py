"""Logits of one chunk of tokens, in fp32 or fp64, in a buffer with a spare column."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_kd.parallel.shards import VocabShard

# Logits that exist at one time: 2^26 are 256 MiB in fp32.
CHUNK_LOGITS = 1 << 26
# Below this the fp32 accumulation of the weight gradient, not the arithmetic, bounds a GPU.
MIN_CHUNK_CUDA = 2048


def chunk_size(chunk_tokens: int | None, columns: int, tokens: int, *, on_cuda: bool) -> int:
    """Tokens per chunk: as asked for, else from the shard's width; never from free memory, so that runs repeat."""
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, not {chunk_tokens}")
    if chunk_tokens is None:
        chunk_tokens = max(CHUNK_LOGITS // max(columns, 1), MIN_CHUNK_CUDA if on_cuda else 64)
    return max(1, min(chunk_tokens, tokens))


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

    def new_buffer(self, tokens: int) -> Tensor:
        """Uninitialised [tokens, valid + 1]: the last column takes what belongs to other ranks."""
        return self.rows.new_empty((tokens, self.shard.valid + 1), dtype=self.dtype)

    def logits_into(self, buffer: Tensor, hidden: Tensor) -> Tensor:
        """hidden [C, H] -> logits in buffer[:, :valid]; returns the buffer."""
        if self.narrow:
            buffer[:, :-1] = torch.mm(hidden, self.rows.t(), out_dtype=self.dtype)
        else:
            torch.mm(hidden.to(self.dtype), self.rows.t(), out=buffer[:, :-1])
        return buffer

    def hidden_gradient(self, logit_gradient: Tensor) -> Tensor:
        """[C, valid] -> this rank's part of the gradient of hidden, [C, H]."""
        return logit_gradient.to(self.rows.dtype) @ self.rows

    def add_weight_gradient_(self, gradient: Tensor, logit_gradient: Tensor, hidden: Tensor) -> None:
        """gradient [V/tp, H] (fp32) += logit_gradient^T hidden, on the valid rows."""
        valid = gradient[: self.shard.valid]
        if self.narrow:
            valid.add_(torch.mm(logit_gradient.to(hidden.dtype).t(), hidden, out_dtype=gradient.dtype))
        else:
            valid.addmm_(logit_gradient.t(), hidden.to(gradient.dtype))
