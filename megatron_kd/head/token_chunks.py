"""Hidden states chunk by chunk, with the collectives of tensor and sequence parallelism hidden behind the products.

Under sequence parallelism a chunk takes the same rows of every rank's slice, so that each rank gathers and gives back equal
parts. N tokens of the full sequence, T ranks that hold slices of it (1 without sequence parallelism), n = N / T.
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
class TokenChunks:
    """Cuts N tokens, of which T ranks hold equal slices, into chunks of at most `size` (at least one of each slice)."""

    tokens: int
    slices: int
    size: int

    def __iter__(self) -> Iterator[slice]:
        """The part of every rank's slice that each chunk takes."""
        held, step = self.tokens // self.slices, max(1, self.size // self.slices)
        for start in range(0, held, step):
            yield slice(start, min(start + step, held))

    @property
    def largest(self) -> int:
        """Tokens of the largest chunk."""
        return min(max(1, self.size // self.slices), self.tokens // self.slices) * self.slices

    def take(self, full: Tensor, part: slice) -> Tensor:
        """[N, ...] -> [C, ...], the chunk's rows of a tensor of the full sequence."""
        return full.view(self.slices, -1, *full.shape[1:])[:, part].flatten(0, 1)

    def put(self, full: Tensor, part: slice, values: Tensor) -> None:
        """The opposite: `values` [C, ...] into `full` [N, ...]."""
        rest = full.shape[1:]
        full.view(self.slices, -1, *rest)[:, part] = values.view(self.slices, -1, *rest)


class HiddenChunks:
    """Hands out hidden states [C, H] and sums their gradient.

    rows: [n, H], this rank's slice under sequence parallelism, else all tokens, the same on every rank. While a chunk is
    worked on, the next one is being gathered and the gradient of the last one summed.
    """

    def __init__(
        self,
        rows: Tensor,
        chunks: TokenChunks,
        group: Group,
        *,
        gradient: torch.dtype | None = None,
    ) -> None:
        self._rows, self._chunks, self._group = rows, chunks, group
        self._gathers = chunks.slices > 1
        self._gradient = None if gradient is None else rows.new_empty(rows.shape, dtype=gradient)
        self._sums: list[Pending] = []

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        parts = list(self._chunks)
        ahead = self._start(parts[0])
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            x = ahead.wait()
            if following is not None:
                ahead = self._start(following)
            yield part, x.flatten(0, 1) if self._gathers else x

    def _start(self, part: slice) -> Pending:
        return (
            start_all_gather(self._rows[part], self._group)
            if self._gathers
            else Pending(self._rows[part])
        )

    def give_back(self, part: slice, gradient: Tensor) -> None:
        """This rank's contribution [C, H] to the gradient of a chunk's hidden states; starts its sum over the ranks."""
        assert self._gradient is not None
        mine = self._gradient[part]
        if self._gathers:
            self._sums.append(start_reduce_scatter_sum(mine, gradient, self._group))
        else:
            mine.copy_(gradient)
            if group_size(self._group) > 1:
                self._sums.append(start_all_reduce_sum(mine, self._group))

    def gradient(self) -> Tensor:
        """[n, H], once everything has been given back."""
        assert self._gradient is not None
        for pending in self._sums:
            pending.wait()
        self._sums.clear()
        return self._gradient
