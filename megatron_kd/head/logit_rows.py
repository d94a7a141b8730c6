"""What is done to the logits of one chunk of tokens, in plain torch and in Triton, behind one set of methods.

`chunk_rows` chooses by where the logits are; triton is imported when it is first needed. Nothing here knows of targets, losses
or process groups.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from megatron_kd.head.plain_rows import MASKED, CompiledRows, GradientTerms, PlainRows, is_tempered

__all__ = ["MASKED", "ChunkRows", "GradientTerms", "chunk_rows", "compile_rows", "is_tempered"]

# `TritonRows` derives from it: what a kernel does not do, torch does.
ChunkRows = PlainRows


_plain: type[PlainRows] = PlainRows


def compile_rows(wanted: bool = True) -> None:
    """Whether rows on a CPU go through torch.compile from now on, in this process; needs a C++ compiler."""
    global _plain
    _plain = CompiledRows if wanted else PlainRows


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def chunk_rows(buffer: Tensor, valid: int, gradient_dtype: torch.dtype | None = None) -> ChunkRows:
    """The rows of `buffer` [C, W], of which the first `valid` columns are this rank's logits; see `PlainRows`.

    gradient_dtype: the type in which the logit gradient is wanted, None for the buffer's. It is a wish: `TritonRows`, which
    takes fp32 logits on a GPU, grants it.
    """
    if buffer.is_cuda and buffer.dtype == torch.float32 and _has_triton():
        from megatron_kd.head.triton_rows import TritonRows

        return TritonRows(buffer, valid, gradient_dtype)
    return _plain(buffer, valid, gradient_dtype)
