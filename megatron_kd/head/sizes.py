"""Define the sizes of the output head's chunks and buffers.

This module imports no torch, because the planner (`megatron_kd.planning`) computes the memory of
the head from the same numbers.
"""

from __future__ import annotations

# Logits of one chunk in fp32: 256 MiB on a GPU, 64 MiB on a CPU.
CHUNK_LOGITS_CUDA, CHUNK_LOGITS_CPU = 1 << 26, 1 << 24
# In smaller chunks the fp32 accumulation of the weight gradient, not the arithmetic, bounds a GPU.
MIN_CHUNK_CUDA, MIN_CHUNK_CPU = 2048, 64
# Logits of all tokens that head_schedule "auto" still keeps: 1 GiB on a GPU, 64 MiB on a CPU.
SAVED_LOGITS_CUDA, SAVED_LOGITS_CPU = 1 << 28, 1 << 24
# Columns whose maximum is computed first when the largest logits of a row are selected.
TILE = 32
# Logits per block of a pass over a chunk. On a CPU a block and one scratch copy fit a second-level
# cache; on a GPU scratch is 64 MiB.
BLOCK, BLOCK_CUDA = 1 << 20, 1 << 24


def chunk_size(chunk_tokens: int | None, columns: int, tokens: int, *, on_cuda: bool) -> int:
    """Return the number of tokens of a chunk of the output head.

    It depends on the run file and the vocabulary shard only, never on free memory, so that runs
    can be repeated exactly.

    Args:
        chunk_tokens: the configured number of tokens, or None to derive it from `columns`.
        columns: vocabulary columns of this tensor-parallel rank.
        tokens: tokens of the whole microbatch, an upper bound of the result.
        on_cuda: True for a GPU, False for a CPU.

    Returns:
        A number in [1, tokens].

    Raises:
        ValueError: if chunk_tokens is below 1.
    """
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, not {chunk_tokens}")
    if chunk_tokens is None:
        logits = CHUNK_LOGITS_CUDA if on_cuda else CHUNK_LOGITS_CPU
        chunk_tokens = max(logits // max(columns, 1), MIN_CHUNK_CUDA if on_cuda else MIN_CHUNK_CPU)
    return max(1, min(chunk_tokens, tokens))


def buffer_width(valid: int) -> int:
    """Return the columns stored for `valid` logits.

    One more column receives the ids of other ranks, and the width is a multiple of TILE.
    """
    return -(-(valid + 1) // TILE) * TILE
