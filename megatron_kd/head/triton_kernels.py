"""The Triton kernels of `triton_rows.TritonRows`. Importing this module imports triton.

A program owns a row, or a stretch of one that no other program touches; there are no atomics and no autotuning, so runs repeat
bit for bit. Within a program a store and a later load of the same bytes, or a load and a later store, may fall to different
threads: a barrier stands between them. Offsets of rows are 64-bit: a chunk may hold more than 2^31 logits. Values are widened to
fp32 as they are loaded, and nothing else is computed in a narrower type.

Shapes: C tokens, W columns stored per row of which the first n are logits and the rest MASKED, T = W / TILE tiles, K ids.
"""

# Types are checked by Triton's compiler, not by mypy: a kernel's arguments are pointers and scalars of the device.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from megatron_kd.head import plain_rows as plain
from megatron_kd.head import sizes

MASKED = tl.constexpr(plain.MASKED)
TILE = tl.constexpr(sizes.TILE)


@triton.jit
def _temperature_of(temperature, row, PER_ROW: tl.constexpr):
    """The row's temperature: of fp32 [C], or the number itself."""
    found = temperature
    if PER_ROW:
        found = tl.load(temperature + row)
    return found


@triton.jit
def _tile_sums(z, temperature, HAS_TEMPERATURE: tl.constexpr, ENTROPY: tl.constexpr):
    """z [B, TILE] -> its largest logit m, sums of exp(z - m), exp((z - m) / temperature) and (z - m) exp(z - m): [B] each.

    A tile of nothing but MASKED has sums, too: they count for nothing beside any logit, nor beside the 0 of a row without one.
    A NaN makes the sums and m NaN (a GPU's maximum alone passes over it).
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
    logits,
    width,
    tiles,
    valid,
    temperature,
    largest,
    mass,
    mass_t,
    weighted,
    total,
    HAS_TEMPERATURE: tl.constexpr,
    PER_ROW: tl.constexpr,
    ENTROPY: tl.constexpr,
    TOTAL: tl.constexpr,
    TILES: tl.constexpr,
):
    """`_tile_sums` of every tile of logits [C, W], and the sum of its logits (total): fp32 [C, T]. Grid (C T / TILES,)."""
    parts = tl.cdiv(tiles, TILES)
    row = (tl.program_id(0) // parts).to(tl.int64)
    tile = tl.program_id(0) % parts * TILES + tl.arange(0, TILES)
    inside = tile < tiles
    column = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    z = tl.load(logits + row * width + column, mask=inside[:, None], other=MASKED).to(tl.float32)
    top, exp, exp_t, weight = _tile_sums(
        z, _temperature_of(temperature, row, PER_ROW), HAS_TEMPERATURE, ENTROPY
    )
    at = row * tiles + tile
    tl.store(largest + at, top, mask=inside)
    tl.store(mass + at, exp, mask=inside)
    if HAS_TEMPERATURE:
        tl.store(mass_t + at, exp_t, mask=inside)
    if ENTROPY:
        tl.store(weighted + at, weight, mask=inside)
    if TOTAL:
        tl.store(total + at, tl.sum(tl.where(column < valid, z, 0.0), 1), mask=inside)


@triton.jit
def _lift_out(logits, columns, count, valid, support, IDS: tl.constexpr):
    """Moves a row's logits at `columns` to `support`, -inf for what is elsewhere, and leaves MASKED; ends with a barrier."""
    lane = tl.arange(0, IDS)
    for start in range(0, count, IDS):
        slot = start + lane
        column = tl.load(columns + slot, mask=slot < count, other=valid)
        z = tl.load(logits + column, mask=column < valid, other=float("-inf")).to(tl.float32)
        tl.store(support + slot, z, mask=slot < count)
    tl.debug_barrier()  # the label, read before, may be one of the ids, and threads share small loads
    for start in range(0, count, IDS):
        column = tl.load(columns + start + lane, mask=start + lane < count, other=valid)
        tl.store(logits + column, tl.full((IDS,), MASKED, tl.float32), mask=column < valid)
    tl.debug_barrier()


@triton.jit
def _sum_again(
    logits,
    columns,
    count,
    valid,
    temperature,
    largest,
    mass,
    mass_t,
    weighted,
    HAS_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    IDS: tl.constexpr,
):
    """`_tile_sums` of a row's tiles that `columns` lie in; ids of one tile all store the same. Ends with a barrier."""
    lane = tl.arange(0, IDS)
    for start in range(0, count, IDS):
        column = tl.load(columns + start + lane, mask=start + lane < count, other=valid)
        here, tile = column < valid, column // TILE
        entry = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
        z = tl.load(logits + entry, mask=here[:, None], other=MASKED).to(tl.float32)
        top, exp, exp_t, weight = _tile_sums(z, temperature, HAS_TEMPERATURE, ENTROPY)
        tl.store(largest + tile, top, mask=here)
        tl.store(mass + tile, exp, mask=here)
        if HAS_TEMPERATURE:
            tl.store(mass_t + tile, exp_t, mask=here)
        if ENTROPY:
            tl.store(weighted + tile, weight, mask=here)
    tl.debug_barrier()


@triton.jit
def split_kernel(
    logits,
    width,
    tiles,
    valid,
    columns,
    label,
    count,
    temperature,
    largest,
    mass,
    mass_t,
    weighted,
    total,
    packed,
    HAS_TEMPERATURE: tl.constexpr,
    PER_ROW: tl.constexpr,
    ENTROPY: tl.constexpr,
    TOTAL: tl.constexpr,
    IDS: tl.constexpr,
    TILES: tl.constexpr,
):
    """`PlainRows.split` of a row whose tiles have been summed by `tile_kernel`: grid (C,).

    Reads K logits, stores MASKED in their place, sums their tiles again without them, and merges the row's tiles. IDS ids and
    TILES tiles at a time.
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
    where = tl.load(label + row)
    tl.store(
        packed + 5, tl.load(logits + where, mask=where < valid, other=float("-inf")).to(tl.float32)
    )
    _lift_out(logits, columns, count, valid, packed + 6, IDS)
    _sum_again(
        logits,
        columns,
        count,
        valid,
        temperature,
        largest,
        mass,
        mass_t,
        weighted,
        HAS_TEMPERATURE,
        ENTROPY,
        IDS,
    )
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
    largest,
    mass,
    mass_t,
    weighted,
    tiles,
    temperature,
    HAS_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    TILES: tl.constexpr,
):
    """A row's tiles -> its largest logit m (0 if nothing is above MASKED), and the three sums of `_tile_sums` relative to m."""
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
        at = start + lane
        below = tl.maximum(tl.load(largest + at, mask=at < tiles, other=MASKED), MASKED) - m
        part = tl.load(mass + at, mask=at < tiles, other=0.0)
        exp = tl.exp(below)
        sum_1 += part * exp
        if HAS_TEMPERATURE:
            sum_t += tl.load(mass_t + at, mask=at < tiles, other=0.0) * tl.exp(below / temperature)
        if ENTROPY:
            sum_w += (tl.load(weighted + at, mask=at < tiles, other=0.0) + below * part) * exp
    found = tl.sum(sum_1, 0)
    found_t = found
    if HAS_TEMPERATURE:
        found_t = tl.sum(sum_t, 0)
    return tl.where(found == found, m, float("nan")), found, found_t, tl.sum(sum_w, 0)


@triton.jit
def _sum_row(values, size, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        found += tl.load(values + start + lane, mask=start + lane < size, other=0.0)
    return tl.sum(found, 0)


@triton.jit
def select_kernel(
    values,
    stride,
    chosen,
    chosen_tiles,
    size,
    valid,
    count,
    found_values,
    found_columns,
    BY_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The `count` largest of a row's candidates, ties to the smaller column, in column order: [C, count]. Grid (C,).

    Candidates are the first `size` columns of values [C, stride], or (BY_TILE) the columns below `valid` of the rising tiles
    chosen [C, chosen_tiles], size = chosen_tiles * TILE; at least `count` of them. The smallest value kept is found bit by bit:
    for integers in the order of the values it is the largest floor that `count` candidates reach.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside, column = lane < size, lane
    if BY_TILE:
        column = (
            tl.load(chosen + row * chosen_tiles + lane // TILE, mask=inside, other=0) * TILE
            + lane % TILE
        )
        inside = inside & (column < valid)
    z = tl.load(values + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)  # one zero, not two
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(z == z, key, 0x7FFFFFFF)  # NaN is the largest, as torch sorts
    key = tl.where(inside, key, -0x80000000)  # below -inf
    floor = tl.where(tl.sum((key >= 0).to(tl.int32), 0) >= count, 0, -0x80000000)
    for step in range(31):
        higher = floor + (1 << (30 - step))
        floor = tl.where(tl.sum((key >= higher).to(tl.int32), 0) >= count, higher, floor)
    above, tied = key > floor, key == floor
    room = count - tl.sum(above.to(tl.int32), 0)
    kept = above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room))
    slot = row * count + tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(found_values + slot, z, mask=kept)
    tl.store(found_columns + slot, column, mask=kept)


@triton.jit
def _slope(z, shift, scale, scale_t, constant, temperature, HAS_TEMPERATURE: tl.constexpr):
    """scale exp(z - shift) + scale_t exp((z - shift) / temperature) - constant; at temperature 1 `scale` holds both."""
    shifted = z - shift
    found = scale * tl.exp(shifted)
    if HAS_TEMPERATURE:
        found += scale_t * tl.exp(shifted / temperature)
    return found - constant


@triton.jit
def _put_support(gradient, columns, support, count, label, label_value, valid, IDS: tl.constexpr):
    """Stores a row's `support` at `columns`, with label_value added where the label is one of them."""
    lane = tl.arange(0, IDS)
    for start in range(0, count, IDS):
        slot = start + lane
        column = tl.load(columns + slot, mask=slot < count, other=valid)
        value = tl.load(support + slot, mask=slot < count, other=0.0).to(tl.float32)
        value += tl.where(column == label, label_value, 0.0)
        tl.store(gradient + column, value.to(gradient.dtype.element_ty), mask=column < valid)


@triton.jit
def gradient_kernel(
    logits,
    width,
    gradient,
    gradient_width,
    valid,
    shift,
    scale,
    scale_t,
    constant,
    temperature,
    columns,
    support,
    count,
    label,
    label_value,
    HAS_TEMPERATURE: tl.constexpr,
    PER_ROW: tl.constexpr,
    HAS_CONSTANT: tl.constexpr,
    IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`PlainRows.gradient` of a row, over its own logits: grid (C,). gradient [C, n] starts where logits do, in 4 or 2 bytes each.

    With 2 bytes, block j overwrites the logits of block j / 2 and of no later one. Threads drift apart, so the barrier of a block
    has every logit of it and of all before it in registers before anything is stored over them.
    """
    row = tl.program_id(0).to(tl.int64)
    t = _temperature_of(temperature, row, PER_ROW)
    logits, gradient = logits + row * width, gradient + row * gradient_width
    a, a_t, m, away = tl.load(scale + row), tl.load(scale_t + row), tl.load(shift + row), 0.0
    if HAS_CONSTANT:
        away = tl.load(constant + row)
    if not HAS_TEMPERATURE:
        a += a_t
    where, extra = tl.load(label + row), tl.load(label_value + row)
    z_label = tl.load(logits + where, mask=where < valid, other=MASKED).to(tl.float32)
    lane = tl.arange(0, BLOCK)
    whole = valid // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        z = tl.load(logits + start + lane).to(tl.float32)
        tl.debug_barrier()
        slope = _slope(z, m, a, a_t, away, t, HAS_TEMPERATURE)
        tl.store(gradient + start + lane, slope.to(gradient.dtype.element_ty))
    if whole < valid:
        inside = whole + lane < valid
        z = tl.load(logits + whole + lane, mask=inside, other=MASKED).to(tl.float32)
        tl.debug_barrier()
        slope = _slope(z, m, a, a_t, away, t, HAS_TEMPERATURE)
        tl.store(gradient + whole + lane, slope.to(gradient.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # what follows replaces stored values
    slope = _slope(z_label, m, a, a_t, away, t, HAS_TEMPERATURE) + extra
    tl.store(gradient + where, slope.to(gradient.dtype.element_ty), mask=where < valid)
    tl.debug_barrier()  # the label may be one of the ids
    _put_support(
        gradient, columns + row * count, support + row * count, count, where, extra, valid, IDS
    )
