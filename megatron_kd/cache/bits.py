"""Numbers of different widths in one string of bits, least significant bit first, all at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]


def pack(values: Words, widths: NDArray[np.int64]) -> bytes:
    """Each value [M] in its width [M] (0 to 32 bits), one after the other. Values must fit."""
    if len(values) == 0:
        return b""
    ends = widths.cumsum()
    starts = ends - widths
    word, shift = starts >> 6, (starts & 63).astype(np.uint64)
    out = np.zeros((int(ends[-1]) >> 6) + 2, dtype=np.uint64)
    # Within a word the bits of different values do not meet, so that their sum is their union.
    first = np.flatnonzero(np.r_[True, word[1:] != word[:-1]])
    out[word[first]] = np.add.reduceat(values << shift, first)
    over = np.flatnonzero(((starts & 63) + widths) > 64)  # at most one value crosses into a word
    out[word[over] + 1] += values[over] >> (np.uint64(64) - shift[over])
    return out.astype("<u8").tobytes()[: (int(ends[-1]) + 7) >> 3]


def unpack(data: bytes | memoryview, widths: NDArray[np.int64]) -> Words:
    """The values [M] of `pack`. ValueError where `data` has not exactly as many bytes as the widths need."""
    ends = widths.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    if len(data) != (total + 7) >> 3:
        raise ValueError(f"{len(data)} bytes of packed bits, expected {(total + 7) >> 3}")
    if len(widths) == 0:
        return np.zeros(0, dtype=np.uint64)
    padded = np.frombuffer(bytes(data) + bytes(8), dtype=np.uint8)
    # Eight bytes from any byte on: a width of up to 32 starts at most 7 bits into them.
    windows = np.ndarray((len(padded) - 7,), dtype="<u8", buffer=padded, strides=(1,))
    starts = ends - widths
    mask = (np.uint64(1) << widths.astype(np.uint64)) - np.uint64(1)
    return (windows[starts >> 3] >> (starts & 7).astype(np.uint64)) & mask
