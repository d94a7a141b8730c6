"""Row operations on a chunk of logits in Triton: one read of the logits for all statistics, one more for the gradient.

The one read gives each tile of TILE columns its largest logit and its sums (`tile_kernel`). From those, about a tenth of the
logits in size, come the largest logits, the row's sums, and the sums of what remains once the support is lifted out: its tiles
are summed again without it, so the mass of the rest is never a difference. Teacher and student take the same steps, so that
equal logits give equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from megatron_kd.head.plain_rows import PlainRows, is_tempered
from megatron_kd.head.sizes import TILE
from megatron_kd.head.triton_kernels import (
    gradient_kernel,
    select_kernel,
    split_kernel,
    tile_kernel,
)

# Columns that one program of the gradient takes at a time, tiles that one program sums, tiles and ids merged at a time.
BLOCK = 4096
TILES = 128
MERGE = 1024
IDS = 64
# What one program of `top` holds in registers: tiles of a row, and the tiles it then looks into.
MOST_TILES, MOST_CHOSEN = 16384, 256


@dataclass(frozen=True)
class TileSums:
    """fp32 [C, T] per tile: `largest` logit m, sums of exp(z - m) and of exp((z - m) / temperature), of (z - m) exp(z - m)
    (entropy) and of z (total); what was not asked for stands as `mass`."""

    temperature: float | Tensor
    entropy: bool
    has_total: bool
    largest: Tensor
    mass: Tensor
    mass_t: Tensor
    weighted: Tensor
    total: Tensor

    def serve(self, temperature: float | Tensor, *, entropy: bool, total: bool) -> bool:
        """Whether all that is there."""
        if isinstance(temperature, Tensor) or isinstance(self.temperature, Tensor):
            same = temperature is self.temperature or not is_tempered(temperature)
        else:
            same = temperature in (1.0, self.temperature)
        return same and self.entropy >= entropy and self.has_total >= total


class TritonRows(PlainRows):
    """`PlainRows` for fp32 logits [C, W] on a GPU. The row stride must be W; columns per row below 2^31, logits any number.

    `gradient` may come in 2 bytes (bf16, fp16), each row over the first half of its own logits: what the products with a
    weight of that type take. `tile_mass` stays in torch: a draw adds it up with the entries of
    one tile, and only if both come from the same exp does no draw depend on where the vocabulary is cut.
    """

    def __init__(
        self, buffer: Tensor, valid: int, gradient_dtype: torch.dtype | None = None
    ) -> None:
        if buffer.dtype != torch.float32 or not buffer.is_contiguous():
            raise ValueError(
                f"TritonRows takes contiguous rows of fp32, not {buffer.dtype} with strides {buffer.stride()}"
            )
        super().__init__(buffer, valid, gradient_dtype)
        self.gradient_dtype = gradient_dtype or buffer.dtype
        self._sums: TileSums | None = None

    def top(self, count: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """See `PlainRows.top`. Shapes are fixed, so nothing waits for the device; beyond MOST_CHOSEN and MOST_TILES torch does it."""
        tiles = -(-self.valid // TILE)
        chosen = min(count, tiles)
        if count == 0 or chosen > MOST_CHOSEN or tiles > MOST_TILES:
            return super().top(count, temperature)
        sums = self._sums = self._tile_sums(temperature, entropy=True, total=False)
        _, where = self._select(sums.largest, tiles, chosen)
        values, columns = self._select(self.buffer, chosen * TILE, count, where)
        values, order = values.sort(
            dim=1, descending=True, stable=True
        )  # columns rise: ties stay in their order
        return values, columns.gather(1, order).long()

    def _select(
        self, values: Tensor, size: int, count: int, tiles: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The `count` largest of the first `size` columns of values, or of `tiles` [C, D] of them: values and int32 columns, rising."""
        rows = values.shape[0]
        found = values.new_empty((rows, count))
        columns = torch.empty((rows, count), dtype=torch.int32, device=values.device)
        block = max(triton.next_power_of_2(size), 128)
        _launch(
            select_kernel,
            (rows,),
            values,
            values.stride(0),
            columns if tiles is None else tiles,
            0 if tiles is None else tiles.shape[1],
            size,
            self.valid,
            count,
            found,
            columns,
            BY_TILE=tiles is not None,
            BLOCK=block,
            num_warps=min(max(block // 512, 4), 16),
        )
        return found, columns

    def mass(self, temperature: float) -> tuple[Tensor, Tensor]:
        """See `PlainRows.mass`. Where there are no logits both are 0."""
        nowhere = torch.full((self.buffer.shape[0],), self.valid, device=self.buffer.device)
        sums = self._tile_sums(temperature, entropy=False, total=False)
        packed = self._merge(
            sums, nowhere.unsqueeze(1)[:, :0], nowhere, temperature, entropy=False, total=False
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
        """See `PlainRows.split`. Columns within a row are unique but for n."""
        sums = self._tile_sums(temperature, entropy=entropy, total=total)
        self._sums = None  # the kernel leaves in them what it needed of the rest
        return self._merge(sums, columns, label, temperature, entropy=entropy, total=total)

    def _tile_sums(self, temperature: float | Tensor, *, entropy: bool, total: bool) -> TileSums:
        """The tiles' sums; those that `top` took, until `split`, so that a teacher's logits are read once."""
        if self._sums is not None and self._sums.serve(temperature, entropy=entropy, total=total):
            return self._sums
        rows, width = self.buffer.shape
        tiles = width // TILE
        tempered = is_tempered(temperature)
        largest, mass, *more = self.buffer.new_empty((2 + tempered + entropy + total, rows, tiles))
        mass_t = more.pop() if tempered else mass
        weighted = more.pop() if entropy else mass
        sums = TileSums(
            temperature,
            entropy,
            total,
            largest,
            mass,
            mass_t,
            weighted,
            more.pop() if total else mass,
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
        """`split` from the tiles' sums, which become those of the rest."""
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
        """See `PlainRows.gradient`. In `gradient_dtype`, each value rounded to it once: [C, n], row stride 4 W bytes."""
        rows, width = self.buffer.shape
        self._sums = None
        gradient = self.buffer.view(self.gradient_dtype)
        _launch(
            gradient_kernel,
            (rows,),
            self.buffer,
            width,
            gradient,
            gradient.shape[1],
            self.valid,
            shift.contiguous(),
            scale.contiguous(),
            scale_t.contiguous(),
            (shift if constant is None else constant).contiguous(),
            _argument(temperature),
            columns.contiguous(),
            support.contiguous(),
            columns.shape[1],
            label.contiguous(),
            label_value.contiguous(),
            HAS_TEMPERATURE=is_tempered(temperature),
            PER_ROW=isinstance(temperature, Tensor),
            HAS_CONSTANT=constant is not None,
            IDS=min(triton.next_power_of_2(max(columns.shape[1], 1)), IDS),
            BLOCK=min(triton.next_power_of_2(max(self.valid, 1)), BLOCK),
            num_warps=8,
        )
        return gradient[:, : self.valid]


def _argument(temperature: float | Tensor) -> float | Tensor:
    return temperature.contiguous() if isinstance(temperature, Tensor) else float(temperature)


def _launch(
    kernel: Any, grid: tuple[int, ...], values: Tensor, *arguments: object, **constants: object
) -> None:
    """Runs a kernel on the device of its first tensor. Fused multiply-adds are asked for, so that no default decides on bits."""
    with torch.cuda.device_of(values):
        kernel[grid](values, *arguments, **constants, enable_fp_fusion=True)
