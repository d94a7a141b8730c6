"""Split integers into a class, which compresses well, and the bits below it, which hardly do.

The bits below are stored as they are. Numbers from 1 on, of one magnitude and one leading bit after
the first, are one class: 1; 2; 3; 4-5; 6-7; 8-11; 12-15; 16-23; ...
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]

CLASSES = 64  # Two for each power of two below 2^32; the second of the power 0 stays empty.
_POWERS = np.arange(CLASSES, dtype=np.int64) >> 1
WIDTHS = np.maximum(_POWERS - 1, 0)  # Number of bits below the class.
_LEAST = (1 << _POWERS) + (np.arange(CLASSES, dtype=np.int64) & 1) * ((1 << _POWERS) >> 1)
_MASKS = ((1 << WIDTHS) - 1).astype(np.uint64)


def split(numbers: Ints) -> tuple[Bytes, bytes]:
    """Return the classes of numbers, and the bits below them.

    Args:
        numbers: int64 [M] in [1, 2^32).

    Returns:
        Classes uint8 [M], and the bits, one number's after the other's, lowest bit first.
    """
    # A float64's exponent and first bit of mantissa are the class: whole numbers below 2^53 are
    # exact.
    classes = (numbers.astype(np.float64).view(np.int64) >> 51) - (1023 << 1)
    return classes.astype(np.uint8), _pack(
        (numbers - _LEAST[classes]).view(np.uint64), WIDTHS[classes]
    )


def join(classes: Bytes, data: Sequence[bytes | memoryview], counts: Ints) -> Ints:
    """Return the numbers of several `split`s one after the other.

    Args:
        classes: uint8 [M], the classes of all splits.
        data: the bits of each split.
        counts: how many numbers each split has.

    Returns:
        int64 [M].

    Raises:
        ValueError: the bits of a split are not exactly as many bytes as its classes need.
    """
    if len(classes) and classes.max() >= CLASSES:
        raise ValueError(f"class {classes.max()}, expected less than {CLASSES}")
    widths = WIDTHS[classes]
    ends = np.zeros(len(widths) + 1, np.int64)
    widths.cumsum(out=ends[1:])
    starts = ends[:-1]
    bits = np.diff(ends[counts.cumsum()], prepend=0)  # In each split.
    sizes = np.array([len(piece) for piece in data])
    if (sizes != (bits + 7) >> 3).any():
        raise ValueError(
            f"{sizes.tolist()} bytes of packed bits, expected {((bits + 7) >> 3).tolist()}"
        )
    if len(data) > 1:
        # Each split begins at a whole byte: add the padding before it.
        starts = starts + np.repeat(8 * (sizes.cumsum() - sizes) - (bits.cumsum() - bits), counts)
    padded = np.frombuffer(b"".join([*data, bytes(8)]), dtype=np.uint8)
    # Windows of eight bytes hold up to 31 bits that start at most 7 bits into them.
    windows = np.ndarray((len(padded) - 7,), dtype="<u8", buffer=padded, strides=(1,))
    below: Ints = ((windows[starts >> 3] >> (starts & 7).view(np.uint64)) & _MASKS[classes]).view(
        np.int64
    )
    return below + _LEAST[classes]


def _pack(values: NDArray[np.uint64], widths: Ints) -> bytes:
    if len(values) == 0:
        return b""
    ends = widths.cumsum()
    starts = ends - widths
    word, shift = starts >> 6, (starts & 63).view(np.uint64)
    words = np.zeros((int(ends[-1]) >> 6) + 2, dtype=np.uint64)
    # Within a word the bits of different values do not meet, so that their sum is their union.
    first = np.flatnonzero(np.diff(word, prepend=-1))
    words[word[first]] = np.add.reduceat(values << shift, first)
    crossing = np.flatnonzero(ends > (word + 1) << 6)  # At most one value per word.
    words[word[crossing] + 1] += values[crossing] >> (np.uint64(64) - shift[crossing])
    return words.astype("<u8").tobytes()[: (int(ends[-1]) + 7) >> 3]
