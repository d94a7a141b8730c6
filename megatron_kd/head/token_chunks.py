"""Cut hidden states into chunks of tokens and run their tensor-parallel collectives.

Under sequence parallelism a chunk takes the same positions of every rank's slice of the sequence,
so that each rank gathers and returns equal parts.

Shapes: N tokens of the full sequence, T ranks that hold slices of it (1 without sequence
parallelism), n = N / T, C tokens of a chunk, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kd.parallel.collectives import (
    Group,
    Pending,
    group_size,
    start_all_gather,
    start_all_reduce_sum,
    start_reduce_scatter_sum,
)


@dataclass(frozen=True)
class Chunk:
    """Address the tokens of one chunk in tensors of the full sequence.

    Attributes:
        part: the chunk's positions in every rank's slice of the sequence.
        slices: number of ranks that hold slices, 1 without sequence parallelism.
    """

    part: slice
    slices: int

    def take(self, full: Tensor) -> Tensor:
        """Return the chunk's entries [C, ...] of a tensor [N, ...] of the full sequence."""
        return full.view(self.slices, -1, *full.shape[1:])[:, self.part].flatten(0, 1)

    def put(self, full: Tensor, values: Tensor) -> None:
        """Write `values` [C, ...] to the chunk's entries of `full` [N, ...]."""
        trailing = full.shape[1:]
        view = full.view(self.slices, -1, *trailing)
        view[:, self.part] = values.view(self.slices, -1, *trailing)


@dataclass(frozen=True)
class TokenChunks:
    """Cut N tokens into chunks of at most `size` tokens, at least one of each slice.

    Attributes:
        tokens: N, a multiple of `slices`.
        slices: number of ranks that hold slices of the sequence.
        size: upper bound of the tokens of a chunk, over all slices.
    """

    tokens: int
    slices: int
    size: int

    def __iter__(self) -> Iterator[Chunk]:
        length, step = self.tokens // self.slices, max(1, self.size // self.slices)
        for start in range(0, length, step):
            yield Chunk(slice(start, min(start + step, length)), self.slices)

    @property
    def largest(self) -> int:
        """Return the number of tokens of the largest chunk."""
        return min(max(1, self.size // self.slices), self.tokens // self.slices) * self.slices


class HiddenChunks:
    """Iterate over the hidden states of each chunk and sum their gradient over the ranks.

    While one chunk is being processed, the next one is gathered and the gradient of the last one
    is summed.
    """

    def __init__(
        self,
        states: Tensor,
        chunks: TokenChunks,
        group: Group,
        *,
        gradient_dtype: torch.dtype | None = None,
    ) -> None:
        """Start nothing yet; the first gather begins with the iteration.

        Args:
            states: [n, H], this rank's slice under sequence parallelism, else all tokens,
                replicated over the group.
            chunks: how the tokens are cut.
            group: tensor-parallel group.
            gradient_dtype: type of the gradient of `states`, None if it is not needed.
        """
        self._states, self._chunks, self._group = states, chunks, group
        self._sliced = chunks.slices > 1
        self._gradient = (
            None if gradient_dtype is None else states.new_empty(states.shape, dtype=gradient_dtype)
        )
        self._sums: list[Pending] = []

    def __iter__(self) -> Iterator[tuple[Chunk, Tensor]]:
        """Yield each chunk and its hidden states [C, H]."""
        chunks = list(self._chunks)
        pending = self._start(chunks[0])
        for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
            states = pending.wait()
            if following is not None:
                pending = self._start(following)
            yield chunk, states.flatten(0, 1) if self._sliced else states

    def _start(self, chunk: Chunk) -> Pending:
        states = self._states[chunk.part]
        return start_all_gather(states, self._group) if self._sliced else Pending(states)

    def add_gradient(self, chunk: Chunk, gradient: Tensor) -> None:
        """Start summing this rank's part [C, H] of the gradient of a chunk's hidden states."""
        assert self._gradient is not None
        local = self._gradient[chunk.part]
        if self._sliced:
            self._sums.append(start_reduce_scatter_sum(local, gradient, self._group))
        else:
            local.copy_(gradient)
            if group_size(self._group) > 1:
                self._sums.append(start_all_reduce_sum(local, self._group))

    def gradient(self) -> Tensor:
        """Return the gradient [n, H] after `add_gradient` was called for every chunk."""
        assert self._gradient is not None
        for pending in self._sums:
            pending.wait()
        self._sums.clear()
        return self._gradient
