"""One sample's target as bytes, and back. The bit-exact description is FORMAT.md; the reasons are here.

Ids of a token are put in rising order and stored as gaps: a gap's bit length through an entropy coder (it carries most of the
structure: frequent tokens have small ids in most vocabularies), its lower bits as they are. Log-probabilities are stored in
steps of 1/24 nat, which leaves every probability within 2.1 % and a KL of step^2 / 24 = 7e-5 nats between what was stored and
what is read, and are scaled back so that they and the stored tail sum to one. Counts of random draws are exact.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from megatron_kd.cache.bits import pack, unpack
from megatron_kd.targets.sparse import SparseTarget

VALUE_ENCODINGS = ("quantized", "fp32")
VERSION = 1
STEPS = 24  # per nat, of a log-probability
ENTROPY_STEPS = 2048  # per nat
LEVELS = 1 << 16
SAMPLED, TAIL, ENTROPY, FP32 = 1, 2, 4, 8
SECTIONS = ("kept", "classes", "gaps", "low", "high", "tail", "entropy")
HEADER = struct.Struct(f"<BBHIIId{len(SECTIONS)}I")

Floats = NDArray[np.float64]
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
    if indices.ndim != 2 or not 0 < indices.shape[1] < LEVELS:
        raise ValueError(f"a record holds a target of shape [S, K] with K from 1 to {LEVELS - 1}, not {indices.shape}")
    used = (indices >= 0) & (logprobs > -np.inf)
    kept = used.sum(1)
    if not kept.all() or np.isnan(logprobs).any():
        raise ValueError("a token has no kept entry, or a log-probability that is not a number: nothing can be learnt from it")
    ids, values = _rising(indices, logprobs, used)
    gaps = _gaps(ids, kept)
    classes = _bit_length(gaps)
    exact = value_encoding == "fp32" and not target.sampled
    draws = (num_draws or indices.shape[1]) if target.sampled else 0
    low, high = _encode_values(values, draws=draws, exact=exact)
    sections = [
        _compress(kept.astype("<u2").view(np.uint8).reshape(-1, 2).T.tobytes()),
        _compress(classes.astype(np.uint8).tobytes()),
        pack((gaps - (1 << (classes - 1))).astype(np.uint64), classes - 1),
        low,
        high,
        _encode_tail(target, values, kept),
        _encode_entropy(target, exact=value_encoding == "fp32"),
    ]
    flags = SAMPLED * target.sampled | TAIL * (target.log_tail is not None) | ENTROPY * (target.entropy is not None)
    flags |= FP32 * (value_encoding == "fp32")
    header = HEADER.pack(VERSION, flags, indices.shape[1], len(kept), len(ids), draws, target.temperature, *map(len, sections))
    return header + b"".join(sections)


@dataclass(frozen=True)
class _Record:
    flags: int
    slots: int
    tokens: int
    entries: int
    draws: int
    temperature: float
    sections: dict[str, memoryview]


def decode(data: bytes | memoryview) -> SparseTarget:
    """The target [S, K] of a record, K as it went in, ids of a token rising (fp32: as they went in). BadRecord for other bytes.

    That the bytes are those that were written is for the caller's checksum to say; this finds what contradicts itself.
    """
    record = _open(data)
    try:
        return _decode(record)
    except (ValueError, IndexError, OSError, pa.ArrowException) as error:
        raise BadRecord(f"a section contradicts the record's header: {error}") from error


def _open(data: bytes | memoryview) -> _Record:
    view = memoryview(data)
    if len(view) < HEADER.size:
        raise BadRecord(f"{len(view)} bytes are too few for a record's header of {HEADER.size}")
    version, flags, slots, tokens, entries, draws, temperature, *lengths = HEADER.unpack(view[: HEADER.size])
    if version != VERSION:
        raise BadRecord(f"record version {version}; this program reads {VERSION}")
    if HEADER.size + sum(lengths) != len(view):
        raise BadRecord(f"{len(view)} bytes, but the header speaks of {HEADER.size + sum(lengths)}")
    if not tokens <= entries <= tokens * slots or not temperature > 0:
        raise BadRecord(f"{entries} entries for {tokens} tokens of at most {slots}, at temperature {temperature}")
    sections, start = {}, HEADER.size
    for name, length in zip(SECTIONS, lengths, strict=True):
        sections[name] = view[start : start + length]
        start += length
    return _Record(flags, slots, tokens, entries, draws, temperature, sections)


def _decode(record: _Record) -> SparseTarget:
    sections, tokens, entries = record.sections, record.tokens, record.entries
    kept = np.frombuffer(_decompress(sections["kept"], 2 * tokens), np.uint8).reshape(2, -1).T.copy().view("<u2").ravel().astype(np.int64)
    if kept.sum() != entries or (tokens and (kept.min() < 1 or kept.max() > record.slots)):
        raise ValueError("entries per token do not add up")
    classes = np.frombuffer(_decompress(sections["classes"], entries), np.uint8).astype(np.int64)
    if entries and (classes.min() < 1 or classes.max() > 32):
        raise ValueError("a gap of no width")
    gaps = unpack(sections["gaps"], classes - 1).astype(np.int64) + (1 << (classes - 1))
    ends = kept.cumsum()
    total = gaps.cumsum()
    before = np.r_[0, total[ends[:-1] - 1]] if tokens else ends
    ids = total - np.repeat(before, kept) - 1
    if entries and ids.max() >= 1 << 31:
        raise ValueError("an id past 2^31")
    values = _decode_values(record)
    tail = np.frombuffer(sections["tail"], "<f4").reshape(-1, tokens) if tokens else np.zeros((0, 0), np.float32)
    log_tail = tail[0] if record.flags & TAIL else None
    if not record.flags & (SAMPLED | FP32):
        values = _rescale(values, kept, ends, _log_kept(record, tail))
    row = np.repeat(np.arange(tokens), kept)
    slot = np.arange(entries) - np.repeat(ends - kept, kept)
    indices = np.full((tokens, record.slots), -1, dtype=np.int32)
    logprobs = np.full((tokens, record.slots), -np.inf, dtype=np.float32)
    indices[row, slot], logprobs[row, slot] = ids, values
    if record.flags & FP32 and not record.flags & SAMPLED:
        order = np.argsort(-logprobs, axis=1, kind="stable")
        indices, logprobs = np.take_along_axis(indices, order, 1), np.take_along_axis(logprobs, order, 1)
    return SparseTarget(
        torch.from_numpy(indices),
        torch.from_numpy(logprobs),
        None if log_tail is None else torch.from_numpy(log_tail.astype(np.float32)),
        _decode_entropy(record),
        record.temperature,
        bool(record.flags & SAMPLED),
    )


def _rising(indices: NDArray[np.int32], logprobs: NDArray[np.float32], used: NDArray[np.bool_]) -> tuple[Ints, NDArray[np.float32]]:
    """Used entries of all tokens, one token after the other, ids of a token rising."""
    if used.all() and (indices[:, 1:] > indices[:, :-1]).all():
        return indices.ravel().astype(np.int64), logprobs.ravel()
    key = np.where(used, indices, np.iinfo(np.int32).max)
    order = np.argsort(key, axis=1, kind="stable")
    mask = np.take_along_axis(used, order, 1)
    ids = np.take_along_axis(indices, order, 1)
    if ((ids[:, 1:] == ids[:, :-1]) & mask[:, 1:]).any():
        raise ValueError("an id is named twice in one row: each kept entry must be a different id")
    return ids[mask].astype(np.int64), np.take_along_axis(logprobs, order, 1)[mask]


def _gaps(ids: Ints, kept: Ints) -> Ints:
    gaps = np.diff(ids, prepend=-1)
    first = kept.cumsum() - kept
    gaps[first] = ids[first] + 1
    return gaps


def _bit_length(values: Ints) -> Ints:
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)


def _encode_values(values: NDArray[np.float32], *, draws: int, exact: bool) -> tuple[bytes, bytes]:
    """Sections low and high: counts as bit length and lower bits, exact values, or levels as low and high bytes."""
    if draws:
        shares = np.exp(values.astype(np.float64)) * draws
        counts = np.rint(shares).astype(np.int64)
        if (counts < 1).any() or (np.abs(shares - counts) > 1e-3 * np.maximum(counts, 1)).any():
            raise ValueError(f"log-probabilities are not counts of {draws} draws")
        classes = _bit_length(counts)
        return _compress(classes.astype(np.uint8).tobytes()), pack((counts - (1 << (classes - 1))).astype(np.uint64), classes - 1)
    if exact:
        return values.astype("<f4").tobytes(), b""
    levels = (
        np.minimum(np.rint(np.maximum(-values.astype(np.float64), 0.0) * STEPS), LEVELS - 1).astype("<u2").view(np.uint8).reshape(-1, 2)
    )
    return _compress(levels[:, 0].tobytes()), _compress(levels[:, 1].tobytes())


def _decode_values(record: _Record) -> NDArray[np.float32] | Floats:
    low, high, entries = record.sections["low"], record.sections["high"], record.entries
    if record.flags & SAMPLED:
        classes = np.frombuffer(_decompress(low, entries), np.uint8).astype(np.int64)
        if entries and (classes.min() < 1 or classes.max() > 32):
            raise ValueError("a count of no width")
        counts = unpack(high, classes - 1).astype(np.int64) + (1 << (classes - 1))
        if entries and counts.max() > record.draws:
            raise ValueError("an id drawn more often than there were draws")
        # The same operations as where the counts were made, so that the same bits come out.
        shares = torch.arange(int(counts.max()) + 1 if entries else 1) / record.draws
        return shares.log().float().numpy()[counts]
    if record.flags & FP32:
        if len(low) != 4 * entries or len(high):
            raise ValueError("not one fp32 value for each entry")
        return np.frombuffer(low, "<f4")
    levels = np.frombuffer(_decompress(low, entries), np.uint8).astype(np.int64)
    levels += np.frombuffer(_decompress(high, entries), np.uint8).astype(np.int64) << 8
    return levels * (-1.0 / STEPS)


def _encode_tail(target: SparseTarget, values: NDArray[np.float32], kept: Ints) -> bytes:
    """log_tail [S], and the log of the kept mass [S] where log_tail does not give it: fp32."""
    parts = [] if target.log_tail is None else [target.log_tail.numpy().astype("<f4")]
    if not target.sampled and (target.log_tail is None or target.temperature != 1.0):
        mass = np.add.reduceat(np.exp(values.astype(np.float64)), kept.cumsum() - kept)
        parts.append(np.log(mass).astype("<f4"))
    return b"".join(part.tobytes() for part in parts)


def _log_kept(record: _Record, tail: NDArray[np.float32]) -> Floats:
    if record.flags & TAIL and record.temperature == 1.0:
        with np.errstate(divide="ignore"):
            return np.log(-np.expm1(np.minimum(tail[0].astype(np.float64), 0.0)))
    return tail[-1].astype(np.float64)


def _rescale(values: Floats, kept: Ints, ends: Ints, log_kept: Floats) -> Floats:
    """Quantised values of each token, moved so that their mass is exp(log_kept)."""
    mass = np.add.reduceat(np.exp(values), ends - kept)
    move = log_kept - np.log(mass)
    return values + np.repeat(np.where(np.isfinite(move), move, 0.0), kept)


def _encode_entropy(target: SparseTarget, *, exact: bool) -> bytes:
    if target.entropy is None:
        return b""
    entropy = target.entropy.numpy()
    if exact:
        return entropy.astype("<f4").tobytes()
    levels = np.minimum(np.rint(entropy.astype(np.float64) * ENTROPY_STEPS), LEVELS - 1).astype("<u2")
    return _compress(levels.view(np.uint8).reshape(-1, 2).T.tobytes())


def _decode_entropy(record: _Record) -> torch.Tensor | None:
    if not record.flags & ENTROPY:
        return None
    if record.flags & FP32:
        return torch.from_numpy(np.frombuffer(record.sections["entropy"], "<f4").astype(np.float32))
    planes = np.frombuffer(_decompress(record.sections["entropy"], 2 * record.tokens), np.uint8).reshape(2, -1)
    return torch.from_numpy((planes.T.copy().view("<u2").ravel() / ENTROPY_STEPS).astype(np.float32))


def _compress(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd", compression_level=3).compress(data, asbytes=True)) if data else b""


def _decompress(data: memoryview, size: int) -> bytes:
    return bytes(pa.Codec("zstd").decompress(pa.py_buffer(data), size, asbytes=True)) if size else b""
