"""Row operations on a chunk of logits in plain torch, any float type.

A chunk is far larger than a processor's cache, so every operation that needs several passes walks over blocks of rows that
fit: the second pass finds the first one's values in the cache. This is worth a factor of two to three on a CPU.

Shapes: C tokens, n valid columns on this rank, W >= n + 1 columns stored, K ids per token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_kd.head.sizes import BLOCK, BLOCK_CUDA, TILE

# Stands for "not here" among logits. Finite, so that 0 * MASKED is 0: with -inf the entropy's p * z would be NaN.
MASKED = -1e30


def is_tempered(temperature: float | Tensor) -> bool:
    """Whether sums at `temperature` are others than at 1; each row's own temperature always counts as such."""
    return isinstance(temperature, Tensor) or temperature != 1.0


def _column(temperature: float | Tensor, part: slice) -> float | Tensor:
    return temperature[part].unsqueeze(1) if isinstance(temperature, Tensor) else temperature


class PlainRows:
    """Logits [C, W] of a chunk, before temperature; columns from `valid` on are the sink and padding. All methods are local.

    `split` leaves MASKED at the columns it lifts out; `gradient` consumes the logits. gradient_dtype: the type in which the
    caller would take the gradient; here it is the buffer's whatever is asked for.
    """

    tile = TILE

    def __init__(
        self, buffer: Tensor, valid: int, gradient_dtype: torch.dtype | None = None
    ) -> None:
        buffer[:, valid:] = MASKED
        self.buffer, self.valid = buffer, valid
        self.gradient_dtype = buffer.dtype

    def _blocks(self, scratch: int) -> Iterator[tuple[slice, list[Tensor]]]:
        """Blocks of rows, each with `scratch` uninitialised tensors of its size, the same memory for every block."""
        tokens, width = self.buffer.shape
        rows = max(1, min(tokens, (BLOCK if self.buffer.is_cpu else BLOCK_CUDA) // width))
        spare = [self.buffer.new_empty((rows, width)) for _ in range(scratch)]
        for start in range(0, tokens, rows):
            stop = min(start + rows, tokens)
            yield slice(start, stop), [tensor[: stop - start] for tensor in spare]

    def top(self, count: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """The `count` <= n largest logits of each row: values [C, count] and columns [C, count], by (value falling, column rising).

        temperature: at which sums of the same rows will be asked for next; the result does not depend on it.
        """
        if count == 0:  # a shard of padding alone
            return self.buffer[:, :0], self.buffer[:, :0].long()
        self.buffer[
            :, self.valid :
        ] = -torch.inf  # padding must not stand before logits that someone has masked out
        found = _top(self.buffer, count)
        self.buffer[:, self.valid :] = MASKED
        return found

    def mass(self, temperature: float) -> tuple[Tensor, Tensor]:
        """The largest logit m [C], and the sum of exp((logit - m) / temperature) [C] over the n columns."""
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
        """Sum of exp((logit - shift) / temperature) over each tile of TILE columns: fp64 [C, W / TILE]. shift: [C]."""
        masses = []
        for part, (exp,) in self._blocks(1):
            torch.sub(self.buffer[part], shift[part].unsqueeze(1), out=exp).div_(temperature).exp_()
            masses.append(exp.view(exp.shape[0], -1, TILE).sum(2, dtype=torch.float64))
        return torch.cat(masses)

    def tiles(self, tiles: Tensor) -> Tensor:
        """The logits of the tiles [C, D] (int64, in [0, W / TILE)): [C, D, TILE]."""
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
        """Lift the support out of the rows and sum what remains.

        Args:
            columns: int64 [C, K] of the support, n for ids that are not here. label: int64 [C], n if it is not here.
            temperature: one for all rows, or each row's own, of the buffer's type [C].
            total, entropy: fill the columns of that name, else 0.
        Returns:
            [C, 6 + K]: the largest remaining logit m (0 if none remains); sum of exp(logit - m) over the remaining; of
            exp((logit - m) / temperature); sum of all n logits (total); of (logit - m) exp(logit - m) over the remaining
            (entropy); the label's logit; the support's logits. -inf for what is not here.
        """
        packed = self.buffer.new_zeros((self.buffer.shape[0], 6 + columns.shape[1]))
        where = torch.cat([label.unsqueeze(1), columns], 1)
        tempered = is_tempered(temperature)
        two = entropy or tempered
        for part, (shifted, *more) in self._blocks(1 + two):
            block, out = self.buffer[part], packed[part]
            out[:, 5:] = block.gather(1, where[part]).masked_fill_(
                where[part] >= self.valid, -torch.inf
            )
            if total:
                out[:, 3] = block[:, : self.valid].sum(1)
            block.scatter_(1, columns[part], MASKED)
            largest = block.amax(1)
            largest = torch.where(largest <= MASKED, 0.0, largest)
            out[:, 0] = largest
            if not two:
                out[:, 1] = self._exp_sum(block, largest, shifted)
                continue
            torch.sub(block, largest.unsqueeze(1), out=shifted)
            if tempered:
                out[:, 2] = (
                    torch.div(shifted, _column(temperature, part), out=more[0]).exp_().sum(1)
                )
            if entropy:
                exp = torch.exp(shifted, out=more[0])
                out[:, 1] = exp.sum(1)
                out[:, 4] = shifted.mul_(exp).sum(1)
            else:
                out[:, 1] = shifted.exp_().sum(1)
        if not tempered:
            packed[:, 2] = packed[:, 1]
        return packed

    def gradient(
        self,
        shift: Tensor,
        scale: Tensor,
        scale_t: Tensor,
        constant: Tensor | None,
        temperature: float | Tensor,
        columns: Tensor,
        support: Tensor,
        label: Tensor,
        label_value: Tensor,
    ) -> Tensor:
        """scale exp(z - shift) + scale_t exp((z - shift) / temperature) - constant, but `support` at `columns`; label_value is
        added at `label`. All [C] but columns and support, [C, K]; columns and temperature as in `split`. Returns [C, n], in the buffer."""
        if not is_tempered(temperature):
            scale = scale + scale_t
        for part, spare in self._blocks(int(is_tempered(temperature))):
            block = self.buffer[part]
            for tempered in spare:
                torch.sub(block, shift[part].unsqueeze(1), out=tempered).div_(
                    _column(temperature, part)
                ).exp_()
            self._scaled_exp_(block, shift[part], scale[part])
            for tempered in spare:
                block.addcmul_(tempered, scale_t[part].unsqueeze(1))
            if constant is not None:
                block.sub_(constant[part].unsqueeze(1))
            block.scatter_(1, columns[part], support[part])
            block.scatter_add_(1, label[part].unsqueeze(1), label_value[part].unsqueeze(1))
        return self.buffer[:, : self.valid]

    @staticmethod
    def _exp_sum(block: Tensor, shift: Tensor, scratch: Tensor) -> Tensor:
        """sum of exp(z - shift) over each row of a block."""
        return torch.sub(block, shift.unsqueeze(1), out=scratch).exp_().sum(1)

    @staticmethod
    def _scaled_exp_(block: Tensor, shift: Tensor, scale: Tensor) -> None:
        """block <- scale exp(z - shift)."""
        block.sub_(shift.unsqueeze(1)).exp_().mul_(scale.unsqueeze(1))


class CompiledRows(PlainRows):
    """The elementwise parts through torch.compile: one loop in place of three. The first use compiles C++ for half a minute."""

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
    """`PlainRows.top` of a tensor [B, W].

    The `count` largest entries lie in the `count` tiles with the largest maxima: an entry of any other tile has `count`
    entries before it, and with tiles in column order the same holds among equal entries. The smallest of those maxima is a
    floor that few entries reach; those are brought together in column order and sorted.
    """
    rows, width = logits.shape
    tiles = width // TILE
    if tiles < 2 * count or width % TILE:
        floor = torch.topk(logits, count, dim=1, sorted=False).values.amin(1)
        values, columns = _at_least(logits, floor)
    else:
        maxima, chosen = _top(logits.view(rows, tiles, TILE).amax(2), count)
        chosen = chosen.sort(1).values
        flat = (
            chosen + torch.arange(0, rows * tiles, tiles, device=logits.device).unsqueeze(1)
        ).flatten()
        candidates = logits.view(rows * tiles, TILE).index_select(0, flat).view(rows, count * TILE)
        values, columns = _at_least(candidates, maxima[:, -1])
        columns = chosen.gather(1, columns // TILE) * TILE + columns % TILE
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :count], columns.gather(1, order[:, :count])


def _at_least(values: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """The entries of each row [B, W] that are not below `floor` [B], in column order: values and columns [B, most of any row]."""
    row, column = (
        (~(values < floor.unsqueeze(1))).nonzero().unbind(1)
    )  # a row with NaN keeps all of them
    count = torch.bincount(row, minlength=values.shape[0])
    slot = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count).index_select(
        0, row
    )
    found = values.new_full((values.shape[0], int(count.max())), -torch.inf)
    columns = torch.zeros_like(found, dtype=torch.int64)
    found[row, slot], columns[row, slot] = values[row, column], column
    return found, columns
