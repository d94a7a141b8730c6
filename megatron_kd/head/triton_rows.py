"""Compute on rows of logits in Triton: one read for all statistics, one more for the gradient.

The one read gives each tile of TILE columns its largest logit and its sums (`tile_kernel`). From
those, about a tenth of the logits in size, come the largest logits, the row's sums, and the sums of
what remains once the support is extracted: its tiles are summed again without it, so the mass of
the rest is never a difference. Teacher and student take the same steps, so that equal logits give
equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from megatron_kd.head.plain_rows import GradientTerms, PlainRows, is_tempered
from megatron_kd.head.sizes import TILE
from megatron_kd.head.triton_kernels import (
    gradient_kernel,
    select_kernel,
    split_kernel,
    tile_kernel,
)

# Columns of a block of the gradient, tiles that one program sums, tiles and ids merged at a time.
BLOCK = 4096
TILES = 128
MERGE = 1024
IDS = 64
# Limits of what one program of `top` holds in registers: tiles of a row, and tiles it selects from.
MAX_TILES, MAX_TOP_TILES = 16384, 256


@dataclass(frozen=True)
class TileSums:
    """Hold the sums of each tile, fp32 [C, T]; those that were not requested are `mass`.

    Attributes:
        temperature: of `mass_t`.
        entropy: True if `weighted` was summed.
        has_total: True if `total` was summed.
        largest: the tile's largest logit m.
        mass: sum of exp(z - m).
        mass_t: sum of exp((z - m) / temperature).
        weighted: sum of (z - m) exp(z - m).
        total: sum of z.
    """

    temperature: float | Tensor
    entropy: bool
    has_total: bool
    largest: Tensor
    mass: Tensor
    mass_t: Tensor
    weighted: Tensor
    total: Tensor

    def include(self, temperature: float | Tensor, *, entropy: bool, total: bool) -> bool:
        """Return True if these sums include the requested ones."""
        if isinstance(temperature, Tensor) or isinstance(self.temperature, Tensor):
            same = temperature is self.temperature or not is_tempered(temperature)
        else:
            same = temperature in (1.0, self.temperature)
        return same and self.entropy >= entropy and self.has_total >= total


class TritonRows(PlainRows):
    """Compute as `PlainRows` on fp32 logits [C, W] on a GPU.

    The row stride must be W, with fewer than 2^31 columns per row and any number of logits.
    `gradient` may come in 2 bytes (bf16, fp16), each row over the first half of its own logits,
    which is what products with a weight of that type take. `tile_mass` stays in torch: a random
    sample compares it with the entries of one tile, and only if both come from the same exp does
    the sample not depend on the boundaries of the vocabulary shards.
    """

    def __init__(
        self, buffer: Tensor, valid: int, gradient_dtype: torch.dtype | None = None
    ) -> None:
        if buffer.dtype != torch.float32 or not buffer.is_contiguous():
            raise ValueError(
                f"TritonRows takes contiguous rows of fp32, not {buffer.dtype} "
                f"with strides {buffer.stride()}"
            )
        super().__init__(buffer, valid, gradient_dtype)
        self.gradient_dtype = gradient_dtype or buffer.dtype
        self._sums: TileSums | None = None

    def top(self, count: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return the largest logits of each row; see `PlainRows.top`.

        Shapes are fixed, so nothing waits for the device. Beyond MAX_TOP_TILES and MAX_TILES torch
        computes it.
        """
        tiles = -(-self.valid // TILE)
        top_count = min(count, tiles)
        if count == 0 or top_count > MAX_TOP_TILES or tiles > MAX_TILES:
            return super().top(count, temperature)
        sums = self._sums = self._tile_sums(temperature, entropy=True, total=False)
        _, top_tiles = self._select(sums.largest, tiles, top_count)
        values, columns = self._select(self.buffer, top_count * TILE, count, top_tiles)
        # Columns rise, so a stable sort leaves ties by rising column.
        values, order = values.sort(dim=1, descending=True, stable=True)
        return values, columns.gather(1, order).long()

    def _select(
        self, values: Tensor, size: int, count: int, tiles: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the `count` largest of some columns of each row, in column order.

        Args:
            values: fp32 [C, stride].
            size: columns to select from.
            count: columns to select.
            tiles: int32 [C, D], select from these tiles (size = D TILE); None: from the first
                `size` columns.

        Returns:
            Values fp32 [C, count] and columns int32 [C, count].
        """
        rows = values.shape[0]
        top_values = values.new_empty((rows, count))
        top_columns = torch.empty((rows, count), dtype=torch.int32, device=values.device)
        block = max(triton.next_power_of_2(size), 128)
        _launch(
            select_kernel,
            (rows,),
            values,
            values.stride(0),
            top_columns if tiles is None else tiles,
            0 if tiles is None else tiles.shape[1],
            size,
            self.valid,
            count,
            top_values,
            top_columns,
            BY_TILE=tiles is not None,
            BLOCK=block,
            num_warps=min(max(block // 512, 4), 16),
        )
        return top_values, top_columns

    def mass(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Return the largest logit and the mass of each row; see `PlainRows.mass`.

        Both are 0 where there are no logits.
        """
        no_labels = torch.full((self.buffer.shape[0],), self.valid, device=self.buffer.device)
        sums = self._tile_sums(temperature, entropy=False, total=False)
        packed = self._merge(
            sums, no_labels.unsqueeze(1)[:, :0], no_labels, temperature, entropy=False, total=False
        )
        return packed[:, 0], packed[:, 2]

    def split(
        self,
        columns: Tensor,
        label: Tensor,
        temperature: float | Tensor,
        *,
        total: bool,
        entropy: bool,
    ) -> Tensor:
        """Extract the support and sum the rest; see `PlainRows.split`.

        Columns within a row must be unique, except for n.
        """
        sums = self._tile_sums(temperature, entropy=entropy, total=total)
        self._sums = None  # The kernel replaces them by the sums of the rest.
        return self._merge(sums, columns, label, temperature, entropy=entropy, total=total)

    def _tile_sums(self, temperature: float | Tensor, *, entropy: bool, total: bool) -> TileSums:
        """Return the sums of the tiles.

        Those that `top` computed serve until `split`, so that a teacher's logits are read once.
        """
        if self._sums is not None and self._sums.include(temperature, entropy=entropy, total=total):
            return self._sums
        rows, width = self.buffer.shape
        tiles = width // TILE
        tempered = is_tempered(temperature)
        largest, mass, *optional = self.buffer.new_empty(
            (2 + tempered + entropy + total, rows, tiles)
        )
        mass_t = optional.pop() if tempered else mass
        weighted = optional.pop() if entropy else mass
        sums = TileSums(
            temperature,
            entropy,
            total,
            largest,
            mass,
            mass_t,
            weighted,
            optional.pop() if total else mass,
        )
        _launch(
            tile_kernel,
            (rows * triton.cdiv(tiles, TILES),),
            self.buffer,
            width,
            tiles,
            self.valid,
            _argument(temperature),
            sums.largest,
            sums.mass,
            sums.mass_t,
            sums.weighted,
            sums.total,
            HAS_TEMPERATURE=is_tempered(temperature),
            PER_ROW=isinstance(temperature, Tensor),
            ENTROPY=entropy,
            TOTAL=total,
            TILES=TILES,
            num_warps=8,
        )
        return sums

    def _merge(
        self,
        sums: TileSums,
        columns: Tensor,
        label: Tensor,
        temperature: float | Tensor,
        *,
        entropy: bool,
        total: bool,
    ) -> Tensor:
        """Return the result of `split` from the tiles' sums, which become those of the rest."""
        rows, width = self.buffer.shape
        count = columns.shape[1]
        packed = self.buffer.new_empty((rows, 6 + count))
        _launch(
            split_kernel,
            (rows,),
            self.buffer,
            width,
            width // TILE,
            self.valid,
            columns.contiguous(),
            label.contiguous(),
            count,
            _argument(temperature),
            sums.largest,
            sums.mass,
            sums.mass_t,
            sums.weighted,
            sums.total,
            packed,
            HAS_TEMPERATURE=is_tempered(temperature),
            PER_ROW=isinstance(temperature, Tensor),
            ENTROPY=entropy,
            TOTAL=total,
            IDS=min(triton.next_power_of_2(max(count, 1)), IDS),
            TILES=min(triton.next_power_of_2(width // TILE), MERGE),
            num_warps=4,
        )
        return packed

    def gradient(self, terms: GradientTerms) -> Tensor:
        """Return the logit gradient; see `PlainRows.gradient`.

        It is [C, n] in `gradient_dtype`, each value rounded to it once, with a row stride of 4 W
        bytes.
        """
        rows, width = self.buffer.shape
        self._sums = None
        gradient = self.buffer.view(self.gradient_dtype)
        count = terms.columns.shape[1]
        _launch(
            gradient_kernel,
            (rows,),
            self.buffer,
            width,
            gradient,
            gradient.shape[1],
            self.valid,
            terms.shift.contiguous(),
            terms.scale.contiguous(),
            terms.scale_t.contiguous(),
            (terms.shift if terms.constant is None else terms.constant).contiguous(),
            _argument(terms.temperature),
            terms.columns.contiguous(),
            terms.support.contiguous(),
            count,
            terms.label.contiguous(),
            terms.label_value.contiguous(),
            HAS_TEMPERATURE=is_tempered(terms.temperature),
            PER_ROW=isinstance(terms.temperature, Tensor),
            HAS_CONSTANT=terms.constant is not None,
            IDS=min(triton.next_power_of_2(max(count, 1)), IDS),
            BLOCK=min(triton.next_power_of_2(max(self.valid, 1)), BLOCK),
            num_warps=8,
        )
        return gradient[:, : self.valid]


def _argument(temperature: float | Tensor) -> float | Tensor:
    return temperature.contiguous() if isinstance(temperature, Tensor) else float(temperature)


def _launch(
    kernel: Any, grid: tuple[int, ...], tensor: Tensor, *arguments: object, **constants: object
) -> None:
    """Run a kernel on the device of its first tensor.

    Fused multiply-adds are requested explicitly, so that no default decides on bits.
    """
    with torch.cuda.device_of(tensor):
        kernel[grid](tensor, *arguments, **constants, enable_fp_fusion=True)
