"""Define the Triton kernels of `triton_rows.TritonRows`. Importing this module imports triton.

A program owns a row, or a part of one that no other program touches. There are no atomics and no
autotuning, so runs repeat bit for bit. Within a program a store and a later load of the same bytes,
or a load and a later store, may fall to different threads: a barrier separates them. Offsets of
rows are 64-bit, because a chunk may hold more than 2^31 logits. Values are widened to fp32 as they
are loaded, and nothing is computed in a narrower type.

Shapes:
    C tokens, W columns stored per row of which the first n are logits and the rest MASKED, T = W /
    TILE tiles, K ids.
"""

# Types are checked by Triton's compiler, not by mypy: a kernel's arguments are pointers and scalars
# of the device.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# A kernel takes no dataclass, and its compile-time constants are upper case by convention.
# ruff: noqa: N803, PLR0913
from __future__ import annotations

import triton
import triton.language as tl

from megatron_kd.head import plain_rows as plain
from megatron_kd.head import sizes

MASKED = tl.constexpr(plain.MASKED)
TILE = tl.constexpr(sizes.TILE)


@triton.jit
def _temperature_of(temperature, row, PER_ROW: tl.constexpr):
    """Return the row's temperature: an element of fp32 [C], or the number itself."""
    value = temperature
    if PER_ROW:
        value = tl.load(temperature + row)
    return value


@triton.jit
def _tile_sums(z, temperature, HAS_TEMPERATURE: tl.constexpr, ENTROPY: tl.constexpr):
    """Return the largest logit m and three sums of each tile of z [B, TILE], all [B].

    The sums are those of exp(z - m), exp((z - m) / temperature) and (z - m) exp(z - m). A tile of
    only MASKED has sums, too: they are negligible beside any logit, and beside the 0 of a row
    without one. A NaN makes the sums and m NaN (a GPU's maximum alone ignores it).
    """
    largest = tl.max(z, 1)
    shifted = z - tl.maximum(largest, MASKED)[:, None]
    exp = tl.exp(shifted)
    mass = tl.sum(exp, 1)
    mass_t, weighted = mass, mass
    if HAS_TEMPERATURE:
        mass_t = tl.sum(tl.exp(shifted / temperature), 1)
    if ENTROPY:
        weighted = tl.sum(shifted * exp, 1)
    return tl.where(mass == mass, largest, float("nan")), mass, mass_t, weighted


@triton.jit
def tile_kernel(
    logits, width, tiles, valid, temperature, largest, mass, mass_t, weighted, total,
    HAS_TEMPERATURE: tl.constexpr, PER_ROW: tl.constexpr, ENTROPY: tl.constexpr,
    TOTAL: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Store `_tile_sums` of every tile of logits [C, W], and the sum of its logits (total).

    All results are fp32 [C, T]. Grid (C T / TILES,).
    """
    programs_per_row = tl.cdiv(tiles, TILES)
    row = (tl.program_id(0) // programs_per_row).to(tl.int64)
    tile = tl.program_id(0) % programs_per_row * TILES + tl.arange(0, TILES)
    inside = tile < tiles
    column = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    z = tl.load(logits + row * width + column, mask=inside[:, None], other=MASKED).to(tl.float32)
    m, exp, exp_t, exp_weighted = _tile_sums(
        z, _temperature_of(temperature, row, PER_ROW), HAS_TEMPERATURE, ENTROPY
    )
    slot = row * tiles + tile
    tl.store(largest + slot, m, mask=inside)
    tl.store(mass + slot, exp, mask=inside)
    if HAS_TEMPERATURE:
        tl.store(mass_t + slot, exp_t, mask=inside)
    if ENTROPY:
        tl.store(weighted + slot, exp_weighted, mask=inside)
    if TOTAL:
        tl.store(total + slot, tl.sum(tl.where(column < valid, z, 0.0), 1), mask=inside)


@triton.jit
def _extract(logits, columns, count, valid, support, IDS: tl.constexpr):
    """Move a row's logits at `columns` to `support` and store MASKED in their place.

    Ids of other ranks give -inf. Ends with a barrier.
    """
    lane = tl.arange(0, IDS)
    for start in range(0, count, IDS):
        slot = start + lane
        column = tl.load(columns + slot, mask=slot < count, other=valid)
        z = tl.load(logits + column, mask=column < valid, other=float("-inf")).to(tl.float32)
        tl.store(support + slot, z, mask=slot < count)
    # The label, read before, may be one of the ids, and threads share small loads.
    tl.debug_barrier()
    for start in range(0, count, IDS):
        column = tl.load(columns + start + lane, mask=start + lane < count, other=valid)
        tl.store(logits + column, tl.full((IDS,), MASKED, tl.float32), mask=column < valid)
    tl.debug_barrier()


@triton.jit
def _sum_again(
    logits, columns, count, valid, temperature, largest, mass, mass_t, weighted,
    HAS_TEMPERATURE: tl.constexpr, ENTROPY: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    """Store `_tile_sums` of the tiles of a row that contain `columns`.

    Ids of one tile all store the same values. Ends with a barrier.
    """
    lane = tl.arange(0, IDS)
    for start in range(0, count, IDS):
        column = tl.load(columns + start + lane, mask=start + lane < count, other=valid)
        is_local, tile = column < valid, column // TILE
        entry = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
        z = tl.load(logits + entry, mask=is_local[:, None], other=MASKED).to(tl.float32)
        m, exp, exp_t, exp_weighted = _tile_sums(z, temperature, HAS_TEMPERATURE, ENTROPY)
        tl.store(largest + tile, m, mask=is_local)
        tl.store(mass + tile, exp, mask=is_local)
        if HAS_TEMPERATURE:
            tl.store(mass_t + tile, exp_t, mask=is_local)
        if ENTROPY:
            tl.store(weighted + tile, exp_weighted, mask=is_local)
    tl.debug_barrier()


@triton.jit
def split_kernel(
    logits, width, tiles, valid, columns, label, count, temperature, largest, mass, mass_t,
    weighted, total, packed, HAS_TEMPERATURE: tl.constexpr, PER_ROW: tl.constexpr,
    ENTROPY: tl.constexpr, TOTAL: tl.constexpr, IDS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Compute `PlainRows.split` of a row whose tiles `tile_kernel` has summed: grid (C,).

    Reads K logits, stores MASKED in their place, sums their tiles again without them, and merges
    the row's tiles, IDS ids and TILES tiles at a time.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    columns += row * count
    packed += row * (6 + count)
    largest += row * tiles
    mass += row * tiles
    mass_t += row * tiles
    weighted += row * tiles
    temperature = _temperature_of(temperature, row, PER_ROW)
    label_column = tl.load(label + row)
    tl.store(
        packed + 5,
        tl.load(logits + label_column, mask=label_column < valid, other=float("-inf")).to(
            tl.float32
        ),
    )
    _extract(logits, columns, count, valid, packed + 6, IDS)
    _sum_again(
        logits, columns, count, valid, temperature, largest, mass, mass_t, weighted,
        HAS_TEMPERATURE, ENTROPY, IDS,
    )  # fmt: skip
    m, sum_1, sum_t, sum_w = _merge_tiles(
        largest, mass, mass_t, weighted, tiles, temperature, HAS_TEMPERATURE, ENTROPY, TILES
    )
    tl.store(packed, m)
    tl.store(packed + 1, sum_1)
    tl.store(packed + 2, sum_t)
    tl.store(packed + 4, sum_w)
    if TOTAL:
        tl.store(packed + 3, _sum_row(total + row * tiles, tiles, TILES))
    else:
        tl.store(packed + 3, 0.0)


@triton.jit
def _merge_tiles(
    largest, mass, mass_t, weighted, tiles, temperature, HAS_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Return a row's largest logit m and the three sums of `_tile_sums` relative to m.

    m is 0 if no logit is above MASKED.
    """
    lane = tl.arange(0, TILES)
    highest = tl.full((TILES,), MASKED, tl.float32)
    for start in range(0, tiles, TILES):
        highest = tl.maximum(
            highest, tl.load(largest + start + lane, mask=start + lane < tiles, other=MASKED)
        )
    m = tl.max(highest, 0)
    m = tl.where(m <= MASKED, 0.0, m)
    sum_1 = tl.zeros((TILES,), tl.float32)
    sum_t = tl.zeros((TILES,), tl.float32)
    sum_w = tl.zeros((TILES,), tl.float32)
    for start in range(0, tiles, TILES):
        slot = start + lane
        shift = tl.maximum(tl.load(largest + slot, mask=slot < tiles, other=MASKED), MASKED) - m
        tile_mass = tl.load(mass + slot, mask=slot < tiles, other=0.0)
        exp = tl.exp(shift)
        sum_1 += tile_mass * exp
        if HAS_TEMPERATURE:
            sum_t += tl.load(mass_t + slot, mask=slot < tiles, other=0.0) * tl.exp(
                shift / temperature
            )
        if ENTROPY:
            sum_w += (
                tl.load(weighted + slot, mask=slot < tiles, other=0.0) + shift * tile_mass
            ) * exp
    total_1 = tl.sum(sum_1, 0)
    total_t = total_1
    if HAS_TEMPERATURE:
        total_t = tl.sum(sum_t, 0)
    return tl.where(total_1 == total_1, m, float("nan")), total_1, total_t, tl.sum(sum_w, 0)


@triton.jit
def _sum_row(values, size, BLOCK: tl.constexpr):
    """Return the sum of the first `size` values."""
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        sums += tl.load(values + start + lane, mask=start + lane < size, other=0.0)
    return tl.sum(sums, 0)


@triton.jit
def select_kernel(
    values, stride, tile_ids, num_tiles, size, valid, count, top_values, top_columns,
    BY_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the `count` largest of a row's candidates, ties to the smaller column, in column order.

    Candidates are the first `size` columns of values [C, stride], or (BY_TILE) the columns below
    `valid` of the rising tiles tile_ids [C, num_tiles], size = num_tiles * TILE; at least `count`
    of them. Results are [C, count]. Grid (C,). The smallest value kept is found bit by bit: for
    integers in the order of the values it is the largest floor that `count` candidates reach.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    is_candidate, column = lane < size, lane
    if BY_TILE:
        column = (
            tl.load(tile_ids + row * num_tiles + lane // TILE, mask=is_candidate, other=0) * TILE
            + lane % TILE
        )
        is_candidate = is_candidate & (column < valid)
    z = tl.load(values + row * stride + column, mask=is_candidate, other=0.0).to(tl.float32)
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)  # One zero, not two.
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(z == z, key, 0x7FFFFFFF)  # NaN is the largest, as torch sorts.
    key = tl.where(is_candidate, key, -0x80000000)  # Below -inf.
    floor = tl.where(tl.sum((key >= 0).to(tl.int32), 0) >= count, 0, -0x80000000)
    for step in range(31):
        higher = floor + (1 << (30 - step))
        floor = tl.where(tl.sum((key >= higher).to(tl.int32), 0) >= count, higher, floor)
    above, is_tied = key > floor, key == floor
    num_tied = count - tl.sum(above.to(tl.int32), 0)
    is_kept = above | (is_tied & (tl.cumsum(is_tied.to(tl.int32), 0) <= num_tied))
    slot = row * count + tl.cumsum(is_kept.to(tl.int32), 0) - 1
    tl.store(top_values + slot, z, mask=is_kept)
    tl.store(top_columns + slot, column, mask=is_kept)


@triton.jit
def _slope(z, shift, scale, scale_t, constant, temperature, HAS_TEMPERATURE: tl.constexpr):
    """Return scale exp(z - shift) + scale_t exp((z - shift) / temperature) - constant.

    At temperature 1 `scale` holds the sum of both scales.
    """
    shifted = z - shift
    slope = scale * tl.exp(shifted)
    if HAS_TEMPERATURE:
        slope += scale_t * tl.exp(shifted / temperature)
    return slope - constant


@triton.jit
def _put_support(gradient, columns, support, count, label, label_value, valid, IDS: tl.constexpr):
    """Store a row's `support` at `columns`, plus label_value where the label is one of them."""
    lane = tl.arange(0, IDS)
    for start in range(0, count, IDS):
        slot = start + lane
        column = tl.load(columns + slot, mask=slot < count, other=valid)
        value = tl.load(support + slot, mask=slot < count, other=0.0).to(tl.float32)
        value += tl.where(column == label, label_value, 0.0)
        tl.store(gradient + column, value.to(gradient.dtype.element_ty), mask=column < valid)


@triton.jit
def gradient_kernel(
    logits, width, gradient, gradient_width, valid, shift, scale, scale_t, constant, temperature,
    columns, support, count, label, label_value, HAS_TEMPERATURE: tl.constexpr,
    PER_ROW: tl.constexpr, HAS_CONSTANT: tl.constexpr, IDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write `PlainRows.gradient` of a row over its own logits: grid (C,).

    gradient [C, n] starts where the logits do, in 4 or 2 bytes each. With 2 bytes, block j
    overwrites the logits of block j / 2 and of no later one. Threads drift apart, so the barrier of
    a block has every logit of it and of all blocks before it in registers before anything is stored
    over them.
    """
    row = tl.program_id(0).to(tl.int64)
    t = _temperature_of(temperature, row, PER_ROW)
    logits, gradient = logits + row * width, gradient + row * gradient_width
    s, s_t, m, c = tl.load(scale + row), tl.load(scale_t + row), tl.load(shift + row), 0.0
    if HAS_CONSTANT:
        c = tl.load(constant + row)
    if not HAS_TEMPERATURE:
        s += s_t
    label_column, label_slope = tl.load(label + row), tl.load(label_value + row)
    z_label = tl.load(logits + label_column, mask=label_column < valid, other=MASKED).to(tl.float32)
    lane = tl.arange(0, BLOCK)
    full_blocks = valid // BLOCK * BLOCK
    for start in range(0, full_blocks, BLOCK):
        z = tl.load(logits + start + lane).to(tl.float32)
        tl.debug_barrier()
        slope = _slope(z, m, s, s_t, c, t, HAS_TEMPERATURE)
        tl.store(gradient + start + lane, slope.to(gradient.dtype.element_ty))
    if full_blocks < valid:
        inside = full_blocks + lane < valid
        z = tl.load(logits + full_blocks + lane, mask=inside, other=MASKED).to(tl.float32)
        tl.debug_barrier()
        slope = _slope(z, m, s, s_t, c, t, HAS_TEMPERATURE)
        tl.store(gradient + full_blocks + lane, slope.to(gradient.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # The following stores replace stored values.
    slope = _slope(z_label, m, s, s_t, c, t, HAS_TEMPERATURE) + label_slope
    tl.store(
        gradient + label_column, slope.to(gradient.dtype.element_ty), mask=label_column < valid
    )
    tl.debug_barrier()  # The label may be one of the ids.
    columns, support = columns + row * count, support + row * count
    _put_support(gradient, columns, support, count, label_column, label_slope, valid, IDS)
