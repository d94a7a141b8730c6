"""Decode the bytes of records to targets; the inverse of `encode`.

Many records are decoded at once: for short samples calls cost more than the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from megatron_kd.cache.bits import Bytes, Ints, join
from megatron_kd.cache.encode import sums
from megatron_kd.cache.levels import Levels, Singles
from megatron_kd.cache.sample_record import (
    ENTROPY,
    ENTROPY_STEPS,
    FP32,
    SAMPLED,
    TAIL,
    BadRecordError,
    RecordParts,
    decompress,
    parse_record,
)
from megatron_kd.targets.sparse import SparseTarget

_MAX_ID = np.iinfo(np.int32).max


def decode(data: bytes | memoryview) -> SparseTarget:
    """Return the target [S, K] of a record.

    K is that of the encoded target, and the ids of a token rise (fp32: they keep their order). This
    finds bytes that contradict themselves; that they are the written ones is for the caller's
    checksum to decide.

    Raises:
        BadRecordError: the bytes are not a record.
    """
    return decode_many([data]).map(lambda tensor: tensor[0])


def decode_many(data: Sequence[bytes | memoryview]) -> SparseTarget:
    """Return the targets [B, S, K] of B records of one kind and length.

    K is the largest of theirs.

    Raises:
        BadRecordError: the bytes are not records, or of different kinds.
    """
    records = [parse_record(payload) for payload in data]
    first = records[0]
    if any(
        (r.flags, r.tokens, r.temperature) != (first.flags, first.tokens, first.temperature)
        for r in records
    ):
        raise BadRecordError(
            "records of different kinds: of other lengths or temperatures, "
            "or some with and some without a part"
        )
    try:
        return _decode(records)
    except (ValueError, IndexError, zstandard.ZstdError) as error:
        raise BadRecordError(f"a section contradicts the record's header: {error}") from error


def _decode(records: Sequence[RecordParts]) -> SparseTarget:
    first = records[0]
    batch, tokens, slots = len(records), first.tokens, max(record.slots for record in records)
    kept = _kept(records)
    used = np.arange(slots) < kept[:, None]
    indices = np.full(used.shape, -1, dtype=np.int32)
    logprobs = np.full(used.shape, -np.inf, dtype=np.float32)
    indices[used] = _ids(records, kept)
    num_columns = bool(first.flags & TAIL) + first.stores_mass
    tail = _from_planes(records, "tail", "<f4", num_columns * tokens).reshape(
        batch, num_columns, tokens
    )
    if first.flags & (SAMPLED | FP32):
        logprobs[used] = _counts(records) if first.flags & SAMPLED else _exact(records)
        if not first.flags & SAMPLED:
            order = np.argsort(-logprobs, axis=1, kind="stable")
            indices, logprobs = (
                np.take_along_axis(indices, order, 1),
                np.take_along_axis(logprobs, order, 1),
            )
    else:
        values, mass = _levels(records, kept)
        logprobs[used] = values
        logprobs += _offsets(first, mass, tail)[:, None]
    return SparseTarget(
        torch.from_numpy(indices).view(batch, tokens, slots),
        torch.from_numpy(logprobs).view(batch, tokens, slots),
        torch.from_numpy(tail[:, 0].astype(np.float32)) if first.flags & TAIL else None,
        _entropy(records),
        first.temperature,
        bool(first.flags & SAMPLED),
    )


def _kept(records: Sequence[RecordParts]) -> Ints:
    """Return the number of entries of each token, [B * S]."""
    kept: Ints = _from_planes(records, "kept", "<u2", records[0].tokens).astype(np.int64)
    if kept.size and (
        kept.min() < 1
        or (kept.sum(1) != [record.entries for record in records]).any()
        or (kept.max(1) > [record.slots for record in records]).any()
    ):
        raise ValueError("entries per token do not add up")
    return kept.ravel()


def _ids(records: Sequence[RecordParts], kept: Ints) -> Ints:
    """Return the ids [M] from their gaps."""
    ids = _numbers(records, "classes", "gaps").cumsum()
    previous = np.zeros(len(kept), np.int64)
    previous[1:] = ids[kept.cumsum()[:-1] - 1]
    ids -= np.repeat(previous + 1, kept)
    if ids.size and ids.max() >= _MAX_ID:
        raise ValueError("an id past 2^31")
    return ids


def _numbers(records: Sequence[RecordParts], classes: str, bits: str) -> Ints:
    """Return the joined numbers [M] of two sections."""
    counts = np.array([record.entries for record in records])
    return join(_bytes(records, classes), [record.sections[bits] for record in records], counts)


def _counts(records: Sequence[RecordParts]) -> Singles:
    """Return the log-probabilities [M] of sampled ids from their counts."""
    counts = _numbers(records, "low", "high")
    logprobs = np.empty(len(counts), np.float32)
    for record, entries in _entry_slices(records):
        largest = int(counts[entries].max(initial=0))
        if largest > record.draws:
            raise ValueError("an id drawn more often than there were draws")
        # The operations of `SampleSelection`, so that the bits are the same.
        logprobs[entries] = (
            (torch.arange(largest + 1) / max(record.draws, 1))
            .log()
            .float()
            .numpy()[counts[entries]]
        )
    return logprobs


def _exact(records: Sequence[RecordParts]) -> Singles:
    """Return log-probabilities [M] that were stored as fp32."""
    if any(
        len(record.sections["low"]) != 4 * record.entries or len(record.sections["high"])
        for record in records
    ):
        raise ValueError("not one fp32 value for each entry")
    return np.frombuffer(b"".join(record.sections["low"] for record in records), "<f4")


def _levels(records: Sequence[RecordParts], kept: Ints) -> tuple[Singles, NDArray[np.float64]]:
    """Return the log-probabilities of the levels [M], and the mass of each token [B * S]."""
    levels = np.repeat(_from_planes(records, "base", "<u2", records[0].tokens).ravel(), kept)
    levels -= _bytes(records, "low")
    levels -= _bytes(records, "high").astype(np.uint16) << 8
    values, shares = np.empty(len(levels), np.float32), np.empty(len(levels))
    for record, entries in _entry_slices(records):
        record_levels = levels[entries]
        logprobs, probabilities = Levels(max(record.steps, 1)).table(
            int(record_levels.max(initial=0))
        )
        values[entries], shares[entries] = logprobs[record_levels], probabilities[record_levels]
    return values, sums(shares, kept)


def _offsets(first: RecordParts, mass: NDArray[np.float64], tail: Singles) -> Singles:
    """Return what is added to each token's log-probabilities [B * S] to restore the kept mass."""
    with np.errstate(divide="ignore", invalid="ignore"):  # Zero mass stays zero.
        if first.stores_mass:
            kept = tail[:, -1].ravel().astype(np.float64)
        else:
            kept = np.log(-np.expm1(np.minimum(tail[:, 0].ravel().astype(np.float64), 0.0)))
        offsets = kept - np.log(mass)
    return np.where(np.isfinite(offsets), offsets, 0.0).astype(np.float32)


def _entropy(records: Sequence[RecordParts]) -> torch.Tensor | None:
    first = records[0]
    if not first.flags & ENTROPY:
        return None
    if first.flags & FP32:
        return torch.from_numpy(
            _from_planes(records, "entropy", "<f4", first.tokens).astype(np.float32)
        )
    return torch.from_numpy(
        (_from_planes(records, "entropy", "<u2", first.tokens) / ENTROPY_STEPS).astype(np.float32)
    )


def _entry_slices(records: Sequence[RecordParts]) -> list[tuple[RecordParts, slice]]:
    """Return each record with the slice of its entries."""
    ends = np.cumsum([record.entries for record in records]).tolist()
    return [
        (record, slice(end - record.entries, end))
        for record, end in zip(records, ends, strict=True)
    ]


def _bytes(records: Sequence[RecordParts], name: str) -> Bytes:
    """Return the bytes [M] of a section with one byte per entry."""
    return np.frombuffer(
        b"".join(decompress(record.sections[name], record.entries) for record in records), np.uint8
    )


def _from_planes(records: Sequence[RecordParts], name: str, dtype: str, count: int) -> NDArray[Any]:
    """Return numbers [B, count] that were stored as byte planes, see `encode`."""
    size = np.dtype(dtype).itemsize
    data = b"".join(decompress(record.sections[name], size * count) for record in records)
    planes = np.frombuffer(data, np.uint8).reshape(len(records), size, count)
    return planes.transpose(0, 2, 1).copy().view(dtype).reshape(len(records), count)
