"""Compute on rows of logits in plain torch, for any float type.

A chunk is far larger than a processor's cache, so every operation that needs several passes
iterates over blocks of rows that fit: the second pass finds the values of the first in the cache.
This is worth a factor of two to three on a CPU.

Shapes:
    C tokens, n valid columns on this rank, W >= n + 1 columns stored, K ids per token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_kd.head.sizes import BLOCK, BLOCK_CUDA, TILE

# Marks logits that take no part. Finite, so that 0 * MASKED is 0: with -inf the entropy's p * z
# would be NaN.
MASKED = -1e30


def is_tempered(temperature: float | Tensor) -> bool:
    """Return False only where the temperature is the number 1.

    A tensor holds a temperature for each row and always counts as tempered.
    """
    return isinstance(temperature, Tensor) or temperature != 1.0


@dataclass(frozen=True)
class GradientTerms:
    """Hold the terms of the logit gradient of a chunk, for `PlainRows.gradient`.

    The gradient of logit z is `scale` exp(z - shift) + `scale_t` exp((z - shift) / temperature) -
    `constant`, except at `columns`, where it is `support`; `label_value` is added at `label`.

    Attributes:
        shift: [C], of the logits' type, as are the other floats.
        scale: [C].
        scale_t: [C].
        constant: [C], or None for 0.
        temperature: one for all rows, or one for each row [C].
        columns: int64 [C, K], n for ids of other ranks.
        support: [C, K].
        label: int64 [C], n for labels of other ranks.
        label_value: [C].
    """

    shift: Tensor
    scale: Tensor
    scale_t: Tensor
    constant: Tensor | None
    temperature: float | Tensor
    columns: Tensor
    support: Tensor
    label: Tensor
    label_value: Tensor


def _column(temperature: float | Tensor, part: slice) -> float | Tensor:
    return temperature[part].unsqueeze(1) if isinstance(temperature, Tensor) else temperature


class PlainRows:
    """Hold the logits of a chunk before temperature, and compute on their rows.

    All methods are local to this rank. `split` leaves MASKED at the columns that it extracts;
    `gradient` overwrites the logits.

    Args:
        buffer: [C, W], any float type; columns from `valid` on are a sink for ids of other ranks,
            and padding. It is used in place.
        valid: n, this rank's logits per row.
        gradient_dtype: the preferred type of the gradient. Here the gradient has the buffer's type.
    """

    tile = TILE

    def __init__(
        self, buffer: Tensor, valid: int, gradient_dtype: torch.dtype | None = None
    ) -> None:
        buffer[:, valid:] = MASKED
        self.buffer, self.valid = buffer, valid
        self.gradient_dtype = buffer.dtype

    def _blocks(self, scratch: int) -> Iterator[tuple[slice, list[Tensor]]]:
        """Yield blocks of rows, each with `scratch` tensors of its size that all blocks share."""
        tokens, width = self.buffer.shape
        rows = max(1, min(tokens, (BLOCK if self.buffer.is_cpu else BLOCK_CUDA) // width))
        buffers = [self.buffer.new_empty((rows, width)) for _ in range(scratch)]
        for start in range(0, tokens, rows):
            stop = min(start + rows, tokens)
            yield slice(start, stop), [tensor[: stop - start] for tensor in buffers]

    def top(self, count: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return the largest logits of each row, by (value falling, column rising).

        Args:
            count: number of logits, at most n.
            temperature: of the sums of the same rows that are computed next; the result does not
                depend on it.

        Returns:
            Values [C, count] and columns int64 [C, count].
        """
        if count == 0:  # a shard of padding alone
            return self.buffer[:, :0], self.buffer[:, :0].long()
        # Padding must not precede logits that a caller has masked out.
        self.buffer[:, self.valid :] = -torch.inf
        values, columns = _top(self.buffer, count)
        self.buffer[:, self.valid :] = MASKED
        return values, columns

    def mass(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Return the largest logit m and the sum of exp((logit - m) / temperature) over n columns.

        Both are [C], of the buffer's type.
        """
        largest, mass = self.buffer.new_empty((2, self.buffer.shape[0]))
        for part, (scaled,) in self._blocks(1):
            block = self.buffer[part]
            torch.amax(block, 1, out=largest[part])
            torch.sub(block, largest[part].unsqueeze(1), out=scaled)
            if temperature != 1.0:
                scaled.div_(temperature)
            torch.sum(scaled.exp_(), 1, out=mass[part])
        return largest, mass

    def tile_mass(self, shift: Tensor, temperature: float) -> Tensor:
        """Return the sum of exp((logit - shift) / temperature) over each tile of TILE columns.

        Args:
            shift: [C].
            temperature: of the softmax.

        Returns:
            fp64 [C, W / TILE].
        """
        masses = []
        for part, (exp,) in self._blocks(1):
            torch.sub(self.buffer[part], shift[part].unsqueeze(1), out=exp).div_(temperature).exp_()
            masses.append(exp.view(exp.shape[0], -1, TILE).sum(2, dtype=torch.float64))
        return torch.cat(masses)

    def tiles(self, tiles: Tensor) -> Tensor:
        """Return the logits of some tiles of each row: [C, D, TILE].

        `tiles` is int64 [C, D], in [0, W / TILE).
        """
        rows, width = self.buffer.shape
        first = torch.arange(0, rows * (width // TILE), width // TILE, device=tiles.device)
        flat = (tiles + first.unsqueeze(1)).flatten()
        return self.buffer.view(-1, TILE).index_select(0, flat).view(*tiles.shape, TILE)

    def split(
        self,
        columns: Tensor,
        label: Tensor,
        temperature: float | Tensor,
        *,
        total: bool,
        entropy: bool,
    ) -> Tensor:
        """Extract the support from the rows and sum what remains.

        Args:
            columns: int64 [C, K] of the support, n for ids of other ranks.
            label: int64 [C], n for labels of other ranks.
            temperature: one for all rows, or one for each row, of the buffer's type [C].
            total: also sum all n logits; else that column is 0.
            entropy: also sum (logit - m) exp(logit - m); else that column is 0.

        Returns:
            [C, 6 + K]: the largest remaining logit m (0 if none remains); sum of exp(logit - m)
            over the remaining; of exp((logit - m) / temperature); sum of all n logits (total); of
            (logit - m) exp(logit - m) over the remaining (entropy); the label's logit; the
            support's logits. -inf for ids of other ranks.
        """
        packed = self.buffer.new_zeros((self.buffer.shape[0], 6 + columns.shape[1]))
        extracted_columns = torch.cat([label.unsqueeze(1), columns], 1)
        tempered = is_tempered(temperature)
        needs_scratch = entropy or tempered
        for part, (shifted, *scratch) in self._blocks(1 + needs_scratch):
            block, out = self.buffer[part], packed[part]
            out[:, 5:] = block.gather(1, extracted_columns[part]).masked_fill_(
                extracted_columns[part] >= self.valid, -torch.inf
            )
            if total:
                out[:, 3] = block[:, : self.valid].sum(1)
            block.scatter_(1, columns[part], MASKED)
            largest = block.amax(1)
            largest = torch.where(largest <= MASKED, 0.0, largest)
            out[:, 0] = largest
            if not needs_scratch:
                out[:, 1] = self._exp_sum(block, largest, shifted)
                continue
            torch.sub(block, largest.unsqueeze(1), out=shifted)
            if tempered:
                out[:, 2] = (
                    torch.div(shifted, _column(temperature, part), out=scratch[0]).exp_().sum(1)
                )
            if entropy:
                exp = torch.exp(shifted, out=scratch[0])
                out[:, 1] = exp.sum(1)
                out[:, 4] = shifted.mul_(exp).sum(1)
            else:
                out[:, 1] = shifted.exp_().sum(1)
        if not tempered:
            packed[:, 2] = packed[:, 1]
        return packed

    def gradient(self, terms: GradientTerms) -> Tensor:
        """Return the logit gradient [C, n], written over the logits."""
        tempered = is_tempered(terms.temperature)
        scale = terms.scale if tempered else terms.scale + terms.scale_t
        for part, scratch in self._blocks(int(tempered)):
            block, shift = self.buffer[part], terms.shift[part]
            for exp_t in scratch:
                torch.sub(block, shift.unsqueeze(1), out=exp_t).div_(
                    _column(terms.temperature, part)
                ).exp_()
            self._scaled_exp_(block, shift, scale[part])
            for exp_t in scratch:
                block.addcmul_(exp_t, terms.scale_t[part].unsqueeze(1))
            if terms.constant is not None:
                block.sub_(terms.constant[part].unsqueeze(1))
            block.scatter_(1, terms.columns[part], terms.support[part])
            block.scatter_add_(
                1, terms.label[part].unsqueeze(1), terms.label_value[part].unsqueeze(1)
            )
        return self.buffer[:, : self.valid]

    @staticmethod
    def _exp_sum(block: Tensor, shift: Tensor, scratch: Tensor) -> Tensor:
        """Return the sum of exp(z - shift) over each row of a block."""
        return torch.sub(block, shift.unsqueeze(1), out=scratch).exp_().sum(1)

    @staticmethod
    def _scaled_exp_(block: Tensor, shift: Tensor, scale: Tensor) -> None:
        """Overwrite the block with scale exp(z - shift)."""
        block.sub_(shift.unsqueeze(1)).exp_().mul_(scale.unsqueeze(1))


class CompiledRows(PlainRows):
    """Compute the elementwise parts through torch.compile: one loop in place of three.

    The first use compiles C++ for half a minute.
    """

    @staticmethod
    def _exp_sum(block: Tensor, shift: Tensor, scratch: Tensor) -> Tensor:
        return _compiled(_fused_exp_sum)(block, shift)  # type: ignore[no-any-return]

    @staticmethod
    def _scaled_exp_(block: Tensor, shift: Tensor, scale: Tensor) -> None:
        _compiled(_fused_scaled_exp_)(block, shift, scale)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _fused_exp_sum(block: Tensor, shift: Tensor) -> Tensor:
    return torch.exp(block - shift.unsqueeze(1)).sum(1)


def _fused_scaled_exp_(block: Tensor, shift: Tensor, scale: Tensor) -> None:
    block.copy_(torch.exp(block - shift.unsqueeze(1)) * scale.unsqueeze(1))


def _top(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return `PlainRows.top` of a tensor [B, W].

    The `count` largest entries lie in the `count` tiles with the largest maxima: an entry of any
    other tile has `count` entries before it, and with tiles in column order the same holds among
    equal entries. The smallest of those maxima is a floor that few entries reach; those are
    gathered in column order and sorted.
    """
    rows, width = logits.shape
    tiles = width // TILE
    if tiles < 2 * count or width % TILE:
        floor = torch.topk(logits, count, dim=1, sorted=False).values.amin(1)
        values, columns = _at_least(logits, floor)
    else:
        maxima, top_tiles = _top(logits.view(rows, tiles, TILE).amax(2), count)
        top_tiles = top_tiles.sort(1).values
        flat = (
            top_tiles + torch.arange(0, rows * tiles, tiles, device=logits.device).unsqueeze(1)
        ).flatten()
        candidates = logits.view(rows * tiles, TILE).index_select(0, flat).view(rows, count * TILE)
        values, columns = _at_least(candidates, maxima[:, -1])
        columns = top_tiles.gather(1, columns // TILE) * TILE + columns % TILE
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :count], columns.gather(1, order[:, :count])


def _at_least(values: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the entries of each row that are not below its floor, in column order.

    Args:
        values: [B, W].
        floor: [B].

    Returns:
        Values and columns, both [B, most entries of any row], padded with -inf and 0.
    """
    # Not `values >= floor`: a row whose floor is NaN keeps all entries.
    row, column = (~(values < floor.unsqueeze(1))).nonzero().unbind(1)
    count = torch.bincount(row, minlength=values.shape[0])
    slot = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count).index_select(
        0, row
    )
    entries = values.new_full((values.shape[0], int(count.max())), -torch.inf)
    columns = torch.zeros_like(entries, dtype=torch.int64)
    entries[row, slot], columns[row, slot] = values[row, column], column
    return entries, columns
