"""Join and parse the parts of a record: header, sections and their compression.

FORMAT.md describes it to the bit.
"""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass

import zstandard

VERSION = 1
ENTROPY_STEPS = 2048  # Per nat.
SAMPLED, TAIL, ENTROPY, FP32 = 1, 2, 4, 8
SECTIONS = ("kept", "classes", "gaps", "base", "low", "high", "tail", "entropy")
HEADER = struct.Struct(f"<BBHIIIId{len(SECTIONS)}I")


class BadRecordError(ValueError):
    """Report bytes that are not a record of this format."""


@dataclass(frozen=True)
class RecordParts:
    """Hold the header and the sections of a record.

    Attributes:
        flags: SAMPLED, TAIL, ENTROPY and FP32.
        slots: K.
        tokens: S.
        entries: kept ids of all tokens.
        draws: samples per token; 0: not sampled.
        steps: of `Levels`.
        temperature: of the target.
        sections: compressed bytes by name.
    """

    flags: int
    slots: int
    tokens: int
    entries: int
    draws: int
    steps: int
    temperature: float
    sections: dict[str, bytes | memoryview]

    @property
    def stores_mass(self) -> bool:
        """Return True if the kept mass is stored: where log_tail does not determine it."""
        return not self.flags & SAMPLED and not (self.flags & TAIL and self.temperature == 1.0)

    def join(self) -> bytes:
        """Return the bytes of the record."""
        sections = [self.sections[name] for name in SECTIONS]
        fields = (
            self.flags,
            self.slots,
            self.tokens,
            self.entries,
            self.draws,
            self.steps,
            self.temperature,
        )
        return HEADER.pack(VERSION, *fields, *map(len, sections)) + b"".join(sections)


def parse_record(data: bytes | memoryview) -> RecordParts:
    """Return the parts of a record's bytes.

    Raises:
        BadRecordError: the header is invalid, or contradicts itself or the length.
    """
    view = memoryview(data)
    if len(view) < HEADER.size:
        raise BadRecordError(
            f"{len(view)} bytes are too few for a record's header of {HEADER.size}"
        )
    version, flags, slots, count, entries, draws, steps, temperature, *lengths = HEADER.unpack(
        view[: HEADER.size]
    )
    if version != VERSION:
        raise BadRecordError(f"record version {version}; this program reads {VERSION}")
    if HEADER.size + sum(lengths) != len(view):
        raise BadRecordError(f"{len(view)} bytes, but the header says {HEADER.size + sum(lengths)}")
    sections: dict[str, bytes | memoryview] = {}
    start = HEADER.size
    for name, length in zip(SECTIONS, lengths, strict=True):
        sections[name] = view[start : start + length]
        start += length
    record = RecordParts(flags, slots, count, entries, draws, steps, temperature, sections)
    if (
        not record.tokens <= record.entries <= record.tokens * record.slots
        or not record.temperature > 0
    ):
        raise BadRecordError(
            f"{record.entries} entries for {record.tokens} tokens of at most {record.slots}, "
            f"at temperature {record.temperature}"
        )
    if not record.flags & (SAMPLED | FP32) and record.entries and not record.steps:
        raise BadRecordError("levels of no width")
    return record


def compress(data: bytes) -> bytes:
    """Return one zstd frame; no bytes for no bytes."""
    return _contexts()[0].compress(data) if data else b""


def decompress(data: bytes | memoryview, size: int) -> bytes:
    """Return the argument of `compress`, which had `size` bytes.

    Raises:
        ValueError, ZstdError: the data is not such a frame.
    """
    if not size:
        return b""
    # Checked before decompressing: a wrong size may be very large.
    frame_size = zstandard.frame_content_size(data)
    if frame_size != size:
        raise ValueError(f"a zstd frame of {frame_size} bytes, expected {size}")
    return _contexts()[1].decompress(data)


def _contexts() -> tuple[zstandard.ZstdCompressor, zstandard.ZstdDecompressor]:
    """Return this thread's contexts: they are slow to create and serve one thread at a time."""
    if not hasattr(_THREAD, "zstd"):
        # Level 1 gives the smallest frames: higher ones search for repetitions in near noise.
        _THREAD.zstd = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    contexts: tuple[zstandard.ZstdCompressor, zstandard.ZstdDecompressor] = _THREAD.zstd
    return contexts


_THREAD = threading.local()
