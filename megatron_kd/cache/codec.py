"""One sample's target as bytes, and back. The bit-exact description is FORMAT.md; the reasons are here.

Ids of a token are put in rising order and stored as gaps, see `bits`: the classes go through an entropy coder and carry most of
the structure (frequent tokens have small ids in most vocabularies). Log-probabilities become levels, see `levels`, and are scaled
back such that they and the stored tail sum to one. Counts of random draws are exact.
"""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from megatron_kd.cache.bits import join, split
from megatron_kd.cache.levels import Levels, steps_for
from megatron_kd.targets.sparse import SparseTarget

VALUE_ENCODINGS = ("quantized", "fp32")
VERSION = 1
ENTROPY_STEPS = 2048  # per nat
LARGEST = (1 << 16) - 1
SAMPLED, TAIL, ENTROPY, FP32 = 1, 2, 4, 8
SECTIONS = ("kept", "classes", "gaps", "low", "high", "tail", "entropy")
HEADER = struct.Struct(f"<BBHIIIId{len(SECTIONS)}I")
_UNUSED = np.iinfo(np.int32).max

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Ints = NDArray[np.int64]


class BadRecord(ValueError):
    """Bytes that are not a record of this format."""


def encode(target: SparseTarget, *, value_encoding: str = "quantized", num_draws: int | None = None) -> bytes:
    """The record of `target` [S, K] (on the CPU).

    Args:
        value_encoding: "quantized", or "fp32": exactly what went in, in its order (ids must fall in log-probability, ties
            rising, as `TopSelection` gives them).
        num_draws: of a sampled target; None: K.
    Raises:
        ValueError: what cannot be stored without losing more than promised.
    """
    if value_encoding not in VALUE_ENCODINGS:
        raise ValueError(f"value_encoding must be one of {', '.join(VALUE_ENCODINGS)}, not {value_encoding!r}")
    indices, logprobs = target.indices.numpy(), target.logprobs.numpy()
    if indices.ndim != 2 or not 0 < indices.shape[1] <= LARGEST:
        raise ValueError(f"a record holds a target of shape [S, K] with K from 1 to {LARGEST}, not {indices.shape}")
    ids, values, kept = _rising(indices, logprobs)
    exact = value_encoding == "fp32"
    draws = (num_draws or indices.shape[1]) if target.sampled else 0
    steps = 0 if target.sampled or exact or not len(ids) else steps_for(kept, _sums(np.exp(values), kept))
    classes, gaps = split(_gaps(ids, kept))
    low, high = _encode_values(values, draws=draws, steps=steps)
    sections = [
        _planes(kept.astype("<u2")),
        _compress(classes.tobytes()),
        gaps,
        low,
        high,
        _encode_tail(target, values, kept),
        _encode_entropy(target, exact=exact),
    ]
    flags = SAMPLED * target.sampled | TAIL * (target.log_tail is not None) | ENTROPY * (target.entropy is not None) | FP32 * exact
    sizes = map(len, sections)
    header = HEADER.pack(VERSION, flags, indices.shape[1], len(kept), len(ids), draws, steps, target.temperature, *sizes)
    return header + b"".join(sections)


@dataclass(frozen=True)
class _Record:
    flags: int
    slots: int
    tokens: int
    entries: int
    draws: int
    steps: int
    temperature: float
    sections: dict[str, memoryview]


def decode(data: bytes | memoryview) -> SparseTarget:
    """The target [S, K] of a record, K as it went in, ids of a token rising (fp32: as they went in). BadRecord for other bytes.

    That the bytes are those that were written is for the caller's checksum to say; this finds what contradicts itself.
    """
    record = _open(data)
    try:
        return _decode(record)
    except (ValueError, IndexError, zstandard.ZstdError) as error:
        raise BadRecord(f"a section contradicts the record's header: {error}") from error


def _open(data: bytes | memoryview) -> _Record:
    view = memoryview(data)
    if len(view) < HEADER.size:
        raise BadRecord(f"{len(view)} bytes are too few for a record's header of {HEADER.size}")
    version, *numbers = HEADER.unpack(view[: HEADER.size])
    fields, lengths = numbers[:7], numbers[7:]
    if version != VERSION:
        raise BadRecord(f"record version {version}; this program reads {VERSION}")
    if HEADER.size + sum(lengths) != len(view):
        raise BadRecord(f"{len(view)} bytes, but the header speaks of {HEADER.size + sum(lengths)}")
    sections, start = {}, HEADER.size
    for name, length in zip(SECTIONS, lengths, strict=True):
        sections[name] = view[start : start + length]
        start += length
    record = _Record(*fields, sections)
    if not record.tokens <= record.entries <= record.tokens * record.slots or not record.temperature > 0:
        raise BadRecord(f"{record.entries} entries for {record.tokens} tokens of at most {record.slots}, at {record.temperature}")
    if not record.flags & (SAMPLED | FP32) and not record.steps:
        raise BadRecord("levels of no width")
    return record


def _decode(record: _Record) -> SparseTarget:
    sections, tokens, slots = record.sections, record.tokens, record.slots
    kept = _from_planes(sections["kept"], "<u2", tokens).astype(np.int64)
    if kept.sum() != record.entries or (tokens and (kept.min() < 1 or kept.max() > slots)):
        raise ValueError("entries per token do not add up")
    ids = _ids(record, kept)
    used = np.arange(slots) < kept[:, None]
    indices = np.full((tokens, slots), -1, dtype=np.int32)
    logprobs = np.full((tokens, slots), -np.inf, dtype=np.float32)
    indices[used] = ids
    parts = bool(record.flags & TAIL) + _stores_mass(record.flags, record.temperature)
    tail = _from_planes(sections["tail"], "<f4", parts * tokens).reshape(parts, tokens)
    log_tail = torch.from_numpy(tail[0].astype(np.float32)) if record.flags & TAIL else None
    if record.flags & (SAMPLED | FP32):
        logprobs[used] = _exact_values(record)
        if not record.flags & SAMPLED:
            order = np.argsort(-logprobs, axis=1, kind="stable")
            indices, logprobs = np.take_along_axis(indices, order, 1), np.take_along_axis(logprobs, order, 1)
    else:
        values, moves = _values_of_levels(record, kept, tail)
        logprobs[used] = values
        logprobs += moves[:, None]
    return SparseTarget(
        torch.from_numpy(indices),
        torch.from_numpy(logprobs),
        log_tail,
        _decode_entropy(record),
        record.temperature,
        bool(record.flags & SAMPLED),
    )


def _rising(indices: NDArray[np.int32], logprobs: Singles) -> tuple[Ints, Singles, Ints]:
    """Used entries of all tokens, one token after the other, ids of a token rising; and how many each token has."""
    used = (indices >= 0) & (logprobs > -np.inf)
    kept = used.sum(1)
    if not kept.all() or np.isnan(logprobs).any():
        raise ValueError("a token has no kept entry, or a log-probability that is not a number: nothing can be learnt from it")
    # One number for id and value: sorting it sorts both.
    joint = np.where(used, indices, _UNUSED).astype(np.int64) << 32 | logprobs.view(np.uint32)
    joint.sort(axis=1)
    ids = joint >> 32
    if ((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] != _UNUSED)).any():
        raise ValueError("an id is named twice in one row: each kept entry must be a different id")
    if len(used) * used.shape[1] != kept.sum():
        joint = joint[ids != _UNUSED]
        ids = joint >> 32
    return ids.ravel(), (joint.ravel() & 0xFFFFFFFF).astype(np.uint32).view(np.float32), kept


def _gaps(ids: Ints, kept: Ints) -> Ints:
    gaps = np.empty_like(ids)
    np.subtract(ids[1:], ids[:-1], out=gaps[1:])
    first = kept.cumsum() - kept
    gaps[first] = ids[first] + 1
    return gaps


def _ids(record: _Record, kept: Ints) -> Ints:
    """[M], of the gaps."""
    starts = kept.cumsum() - kept
    classes = np.frombuffer(_decompress(record.sections["classes"], record.entries), np.uint8)
    total = join(classes, record.sections["gaps"]).cumsum()
    before = np.zeros_like(starts)
    before[1:] = total[starts[1:] - 1]
    total -= np.repeat(before + 1, kept)
    if record.entries and total.max() >= _UNUSED:
        raise ValueError("an id past 2^31")
    return total


def _encode_values(values: Singles, *, draws: int, steps: int) -> tuple[bytes, bytes]:
    """Sections low and high: counts as classes and the bits below, levels as low and high bytes, or exact values."""
    if draws:
        shares = np.exp(values.astype(np.float64)) * draws
        counts = np.rint(shares).astype(np.int64)
        if (counts < 1).any() or (np.abs(shares - counts) > 1e-3 * np.maximum(counts, 1)).any():
            raise ValueError(f"log-probabilities are not counts of {draws} draws")
        classes, below = split(counts)
        return _compress(classes.tobytes()), below
    if not steps:
        return values.astype("<f4").tobytes(), b""
    levels = Levels(steps).of(values)
    return _compress(levels.astype(np.uint8).tobytes()), _compress((levels >> 8).astype(np.uint8).tobytes())


def _exact_values(record: _Record) -> Singles:
    """[M], of counts or of fp32."""
    low, high, entries = record.sections["low"], record.sections["high"], record.entries
    if not record.flags & SAMPLED:
        if len(low) != 4 * entries or len(high):
            raise ValueError("not one fp32 value for each entry")
        return np.frombuffer(low, "<f4")
    counts = join(np.frombuffer(_decompress(low, entries), np.uint8), high)
    most = int(counts.max()) if entries else 0
    if most > record.draws:
        raise ValueError("an id drawn more often than there were draws")
    # The same operations as where the counts were made, so that the same bits come out.
    table: Singles = (torch.arange(most + 1) / max(record.draws, 1)).log().float().numpy()
    return table[counts]


def _values_of_levels(record: _Record, kept: Ints, tail: Singles) -> tuple[Singles, Singles]:
    """Log-probabilities of the levels [M], and by how much each token's move [S] so that their mass is what was kept."""
    levels = np.frombuffer(_decompress(record.sections["high"], record.entries), np.uint8).astype(np.uint16)
    levels <<= 8
    levels |= np.frombuffer(_decompress(record.sections["low"], record.entries), np.uint8)
    table = Levels(record.steps).logprobs(int(levels.max()) if record.entries else 0)
    with np.errstate(divide="ignore", invalid="ignore"):  # no mass stays none
        moves = _log_kept(record, tail) - np.log(_sums(np.exp(table)[levels], kept))
    return table.astype(np.float32)[levels], np.where(np.isfinite(moves), moves, 0.0).astype(np.float32)


def _sums(values: NDArray[Any], kept: Ints) -> NDArray[Any]:
    """Of each token's entries, [M] -> [S]; every token has at least one."""
    return np.add.reduceat(values, kept.cumsum() - kept) if len(values) else values


def _stores_mass(flags: int, temperature: float) -> bool:
    """Whether the kept mass is stored: where log_tail does not give it."""
    return not flags & SAMPLED and not (flags & TAIL and temperature == 1.0)


def _encode_tail(target: SparseTarget, values: Singles, kept: Ints) -> bytes:
    """log_tail [S], and the log of the kept mass [S] where log_tail does not give it: fp32."""
    parts = [] if target.log_tail is None else [target.log_tail.numpy()]
    if _stores_mass(SAMPLED * target.sampled | TAIL * (target.log_tail is not None), target.temperature):
        parts.append(np.log(_sums(np.exp(values.astype(np.float64)), kept)).astype(np.float32))
    return _planes(np.concatenate(parts).astype("<f4")) if parts else b""


def _log_kept(record: _Record, tail: Singles) -> Floats:
    if record.flags & TAIL and record.temperature == 1.0:
        return np.log(-np.expm1(np.minimum(tail[0].astype(np.float64), 0.0)))
    return tail[-1].astype(np.float64)


def _encode_entropy(target: SparseTarget, *, exact: bool) -> bytes:
    if target.entropy is None:
        return b""
    entropy = target.entropy.numpy()
    if exact:
        return _planes(entropy.astype("<f4"))
    return _planes(np.minimum(np.rint(entropy.astype(np.float64) * ENTROPY_STEPS), LARGEST).astype("<u2"))


def _decode_entropy(record: _Record) -> torch.Tensor | None:
    if not record.flags & ENTROPY:
        return None
    if record.flags & FP32:
        return torch.from_numpy(_from_planes(record.sections["entropy"], "<f4", record.tokens).astype(np.float32))
    return torch.from_numpy((_from_planes(record.sections["entropy"], "<u2", record.tokens) / ENTROPY_STEPS).astype(np.float32))


def _planes(numbers: NDArray[np.generic]) -> bytes:
    """The first byte of every number, then the second of every one, and so on, compressed."""
    return _compress(numbers.view(np.uint8).reshape(len(numbers), -1).T.tobytes())


def _from_planes(data: memoryview, dtype: str, count: int) -> NDArray[np.generic]:
    size = np.dtype(dtype).itemsize
    return np.frombuffer(_decompress(data, size * count), np.uint8).reshape(size, count).T.copy().view(dtype).ravel()


def _compress(data: bytes) -> bytes:
    return _contexts()[0].compress(data) if data else b""


def _decompress(data: memoryview, size: int) -> bytes:
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
