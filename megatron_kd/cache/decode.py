"""Bytes of records as targets; `encode` is the way there. Many at once: for short samples the calls cost more than the numbers."""

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

_MOST = np.iinfo(np.int32).max


def decode(data: bytes | memoryview) -> SparseTarget:
    """The target [S, K] of a record, K as it went in, ids of a token rising (fp32: as they went in). BadRecordError for other bytes.

    That the bytes are those that were written is for the caller's checksum to say; this finds what contradicts itself.
    """
    return decode_many([data]).map(lambda tensor: tensor[0])


def decode_many(data: Sequence[bytes | memoryview]) -> SparseTarget:
    """The targets [B, S, K] of B records of one kind and length, K the largest of theirs. BadRecordError as `decode`."""
    records = [parse_record(one) for one in data]
    first = records[0]
    if any(
        (r.flags, r.tokens, r.temperature) != (first.flags, first.tokens, first.temperature)
        for r in records
    ):
        raise BadRecordError(
            "records of different kinds: of other lengths or temperatures, or some with and some without a part"
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
    parts = bool(first.flags & TAIL) + first.stores_mass
    tail = _from_planes(records, "tail", "<f4", parts * tokens).reshape(batch, parts, tokens)
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
        logprobs += _moves(first, mass, tail)[:, None]
    return SparseTarget(
        torch.from_numpy(indices).view(batch, tokens, slots),
        torch.from_numpy(logprobs).view(batch, tokens, slots),
        torch.from_numpy(tail[:, 0].astype(np.float32)) if first.flags & TAIL else None,
        _entropy(records),
        first.temperature,
        bool(first.flags & SAMPLED),
    )


def _kept(records: Sequence[RecordParts]) -> Ints:
    """[B * S], entries of each token."""
    kept: Ints = _from_planes(records, "kept", "<u2", records[0].tokens).astype(np.int64)
    if kept.size and (
        kept.min() < 1
        or (kept.sum(1) != [record.entries for record in records]).any()
        or (kept.max(1) > [record.slots for record in records]).any()
    ):
        raise ValueError("entries per token do not add up")
    return kept.ravel()


def _ids(records: Sequence[RecordParts], kept: Ints) -> Ints:
    """[M], of the gaps."""
    total = _numbers(records, "classes", "gaps").cumsum()
    before = np.zeros(len(kept), np.int64)
    before[1:] = total[kept.cumsum()[:-1] - 1]
    total -= np.repeat(before + 1, kept)
    if total.size and total.max() >= _MOST:
        raise ValueError("an id past 2^31")
    return total


def _numbers(records: Sequence[RecordParts], classes: str, bits: str) -> Ints:
    """[M], split numbers."""
    counts = np.array([record.entries for record in records])
    return join(_bytes(records, classes), [record.sections[bits] for record in records], counts)


def _counts(records: Sequence[RecordParts]) -> Singles:
    """[M], log-probabilities of counts of draws."""
    counts = _numbers(records, "low", "high")
    found = np.empty(len(counts), np.float32)
    for record, part in _parts(records):
        most = int(counts[part].max(initial=0))
        if most > record.draws:
            raise ValueError("an id drawn more often than there were draws")
        # The same operations as where the counts were made, so that the same bits come out.
        found[part] = (
            (torch.arange(most + 1) / max(record.draws, 1)).log().float().numpy()[counts[part]]
        )
    return found


def _exact(records: Sequence[RecordParts]) -> Singles:
    """[M], log-probabilities stored as they are."""
    if any(
        len(record.sections["low"]) != 4 * record.entries or len(record.sections["high"])
        for record in records
    ):
        raise ValueError("not one fp32 value for each entry")
    return np.frombuffer(b"".join(record.sections["low"] for record in records), "<f4")


def _levels(records: Sequence[RecordParts], kept: Ints) -> tuple[Singles, NDArray[np.float64]]:
    """Log-probabilities of the levels [M], and the mass of each token's [B * S]."""
    levels = np.repeat(_from_planes(records, "base", "<u2", records[0].tokens).ravel(), kept)
    levels -= _bytes(records, "low")
    levels -= _bytes(records, "high").astype(np.uint16) << 8
    values, shares = np.empty(len(levels), np.float32), np.empty(len(levels))
    for record, part in _parts(records):
        mine = levels[part]
        logprobs, probabilities = Levels(max(record.steps, 1)).table(int(mine.max(initial=0)))
        values[part], shares[part] = logprobs[mine], probabilities[mine]
    return values, sums(shares, kept)


def _moves(first: RecordParts, mass: NDArray[np.float64], tail: Singles) -> Singles:
    """By how much the log-probabilities of each token move [B * S], so that their mass is what was kept."""
    with np.errstate(divide="ignore", invalid="ignore"):  # no mass stays none
        if first.stores_mass:
            kept = tail[:, -1].ravel().astype(np.float64)
        else:
            kept = np.log(-np.expm1(np.minimum(tail[:, 0].ravel().astype(np.float64), 0.0)))
        moves = kept - np.log(mass)
    return np.where(np.isfinite(moves), moves, 0.0).astype(np.float32)


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


def _parts(records: Sequence[RecordParts]) -> list[tuple[RecordParts, slice]]:
    """Each record with the place of its entries."""
    ends = np.cumsum([record.entries for record in records]).tolist()
    return [
        (record, slice(end - record.entries, end))
        for record, end in zip(records, ends, strict=True)
    ]


def _bytes(records: Sequence[RecordParts], name: str) -> Bytes:
    """[M], a byte for each entry."""
    return np.frombuffer(
        b"".join(decompress(record.sections[name], record.entries) for record in records), np.uint8
    )


def _from_planes(records: Sequence[RecordParts], name: str, dtype: str, count: int) -> NDArray[Any]:
    """[B, count], numbers of which all first bytes come first."""
    size = np.dtype(dtype).itemsize
    data = b"".join(decompress(record.sections[name], size * count) for record in records)
    planes = np.frombuffer(data, np.uint8).reshape(len(records), size, count)
    return planes.transpose(0, 2, 1).copy().view(dtype).reshape(len(records), count)
