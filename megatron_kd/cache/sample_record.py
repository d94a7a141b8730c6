"""The parts of a record: its header, its sections, and how they are compressed. FORMAT.md describes it to the bit."""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass

import zstandard

VERSION = 1
ENTROPY_STEPS = 2048  # per nat
SAMPLED, TAIL, ENTROPY, FP32 = 1, 2, 4, 8
SECTIONS = ("kept", "classes", "gaps", "base", "low", "high", "tail", "entropy")
HEADER = struct.Struct(f"<BBHIIIId{len(SECTIONS)}I")


class BadRecordError(ValueError):
    """Bytes that are not a record of this format."""


@dataclass(frozen=True)
class RecordParts:
    """A record, taken apart. slots: K; tokens: S; entries: kept ids of all tokens; steps: see `levels`."""

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
        """Whether the kept mass is stored: where log_tail does not give it."""
        return not self.flags & SAMPLED and not (self.flags & TAIL and self.temperature == 1.0)

    def join(self) -> bytes:
        """The record's bytes."""
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
    """The parts of a record's bytes. BadRecordError where the header is not one, or contradicts itself or the length."""
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
        raise BadRecordError(
            f"{len(view)} bytes, but the header speaks of {HEADER.size + sum(lengths)}"
        )
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
            f"{record.entries} entries for {record.tokens} tokens of at most {record.slots}, at {record.temperature}"
        )
    if not record.flags & (SAMPLED | FP32) and record.entries and not record.steps:
        raise BadRecordError("levels of no width")
    return record


def compress(data: bytes) -> bytes:
    """One zstd frame; nothing for nothing."""
    return _contexts()[0].compress(data) if data else b""


def decompress(data: bytes | memoryview, size: int) -> bytes:
    """What `compress` was given, which was of `size` bytes. ValueError, ZstdError."""
    if not size:
        return b""
    told = zstandard.frame_content_size(data)  # asked first: a wrong one may be very large
    if told != size:
        raise ValueError(f"a zstd frame of {told} bytes, expected {size}")
    return _contexts()[1].decompress(data)


def _contexts() -> tuple[zstandard.ZstdCompressor, zstandard.ZstdDecompressor]:
    """This thread's: they are costly to make and serve one thread at a time."""
    if not hasattr(_THREAD, "zstd"):
        # Level 1 is the smallest here: higher ones look for repetitions in what is nearly noise.
        _THREAD.zstd = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    found: tuple[zstandard.ZstdCompressor, zstandard.ZstdDecompressor] = _THREAD.zstd
    return found


_THREAD = threading.local()
