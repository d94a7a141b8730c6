"""Choose the implementation of the row operations on a chunk's logits: plain torch or Triton.

Triton is imported when it is first needed. Nothing here depends on targets, losses or process
groups.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from megatron_kd.head.plain_rows import MASKED, CompiledRows, GradientTerms, PlainRows, is_tempered

__all__ = ["MASKED", "ChunkRows", "GradientTerms", "chunk_rows", "compile_rows", "is_tempered"]

# `TritonRows` derives from it: operations without a kernel run in torch.
ChunkRows = PlainRows


_plain: type[PlainRows] = PlainRows


def compile_rows(enabled: bool = True) -> None:
    """Compile the row operations on a CPU, in this process from now on; needs a C++ compiler."""
    global _plain
    _plain = CompiledRows if enabled else PlainRows


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def chunk_rows(buffer: Tensor, valid: int, gradient_dtype: torch.dtype | None = None) -> ChunkRows:
    """Return the row operations on `buffer`.

    Args:
        buffer: [C, W], of which the first `valid` columns are this rank's logits.
        valid: number of logits per row.
        gradient_dtype: preferred type of the logit gradient, None for the buffer's. Only
            `TritonRows`, which takes fp32 logits on a GPU, follows it.
    """
    if buffer.is_cuda and buffer.dtype == torch.float32 and _has_triton():
        from megatron_kd.head.triton_rows import TritonRows

        return TritonRows(buffer, valid, gradient_dtype)
    return _plain(buffer, valid, gradient_dtype)
