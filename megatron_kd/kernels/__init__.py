"""What is done to the logits of one chunk of tokens, in plain torch and in Triton, behind one set of methods.

`chunk_rows` chooses by where the logits are. Nothing here knows of targets, losses or process groups.
"""

from __future__ import annotations

from torch import Tensor

from megatron_kd.kernels.plain import PUNCHED, PlainRows, buffer_width

__all__ = ["PUNCHED", "ChunkRows", "buffer_width", "chunk_rows"]

ChunkRows = PlainRows


def chunk_rows(buffer: Tensor, valid: int) -> ChunkRows:
    """The rows of `buffer` [C, W], of which the first `valid` columns are this rank's logits; see `PlainRows`."""
    return PlainRows(buffer, valid)
