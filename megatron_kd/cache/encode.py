"""Encode one sample's target as bytes; `decode` is the inverse.

FORMAT.md describes the bits, this module gives the reasons. Ids of a token are sorted and stored as
gaps, see `bits`: the classes go through an entropy coder and carry most of the structure (frequent
tokens have small ids in most vocabularies). Log-probabilities become levels, see `levels`, and are
rescaled such that they and the stored tail sum to one. Counts of random samples are exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_kd.cache.bits import Ints, split
from megatron_kd.cache.levels import Levels, Singles, steps_for
from megatron_kd.cache.sample_record import (
    ENTROPY,
    ENTROPY_STEPS,
    FP32,
    SAMPLED,
    TAIL,
    RecordParts,
    compress,
)
from megatron_kd.targets.sparse import SparseTarget

VALUE_ENCODINGS = ("quantized", "fp32")
LARGEST = (1 << 16) - 1
_UNUSED = np.iinfo(np.int32).max


def encode(
    target: SparseTarget, *, value_encoding: str = "quantized", num_draws: int | None = None
) -> bytes:
    """Return the record of a target.

    Args:
        target: [S, K], on the CPU.
        value_encoding: "quantized", or "fp32": exactly the input, in its order (ids must be sorted
            by falling log-probability, ties by rising id, as `TopSelection` gives them).
        num_draws: samples per token of a sampled target; None: K.

    Raises:
        ValueError: the target cannot be stored without losing more than promised.
    """
    if value_encoding not in VALUE_ENCODINGS:
        raise ValueError(
            f"value_encoding must be one of {', '.join(VALUE_ENCODINGS)}, not {value_encoding!r}"
        )
    indices, logprobs = target.indices.numpy(), target.logprobs.numpy()
    if indices.ndim != 2 or not 0 < indices.shape[1] <= LARGEST:
        raise ValueError(
            f"a record holds a target of shape [S, K] with K from 1 to {LARGEST}, "
            f"not {indices.shape}"
        )
    ids, values, kept = _sort_entries(indices, logprobs)
    exact = value_encoding == "fp32"
    draws = (num_draws or indices.shape[1]) if target.sampled else 0
    steps = (
        0
        if target.sampled or exact or not len(ids)
        else steps_for(kept, sums(np.exp(values), kept))
    )
    flags = (
        SAMPLED * target.sampled
        | TAIL * (target.log_tail is not None)
        | ENTROPY * (target.entropy is not None)
        | FP32 * exact
    )
    classes, gaps = split(_gaps(ids, kept))
    base, low, high = _encode_values(values, kept, draws=draws, steps=steps)
    sections: dict[str, bytes | memoryview] = {
        "kept": _planes(kept.astype("<u2")),
        "classes": compress(classes.tobytes()),
        "gaps": gaps,
        "base": base,
        "low": low,
        "high": high,
        "entropy": _encode_entropy(target, exact=exact),
    }
    record = RecordParts(
        flags, indices.shape[1], len(kept), len(ids), draws, steps, target.temperature, sections
    )
    sections["tail"] = _encode_tail(target, values, kept, with_mass=record.stores_mass)
    return record.join()


def _sort_entries(indices: NDArray[np.int32], logprobs: Singles) -> tuple[Ints, Singles, Ints]:
    """Return the used entries of all tokens, one token after the other, with rising ids.

    Args:
        indices: int32 [S, K].
        logprobs: fp32 [S, K].

    Returns:
        Ids [M], log-probabilities [M], and the number of entries of each token [S].
    """
    used = (indices >= 0) & (logprobs > -np.inf)
    kept = used.sum(1)
    if not kept.all() or np.isnan(logprobs).any():
        raise ValueError(
            "a token has no kept entry, or a log-probability that is not a number: "
            "nothing can be learnt from it"
        )
    # The id and the value are packed into one number, so that one sort orders both.
    joint = np.where(used, indices, _UNUSED).astype(np.int64) << 32 | logprobs.view(np.uint32)
    joint.sort(axis=1)
    ids = joint >> 32
    if ((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] != _UNUSED)).any():
        raise ValueError(
            "an id is named twice for one token: each kept entry must be a different id"
        )
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


def _encode_values(
    values: Singles, kept: Ints, *, draws: int, steps: int
) -> tuple[bytes, bytes, bytes]:
    """Return the sections base, low and high of log-probabilities.

    Counts are stored as classes and the bits below, exact values as fp32. Of levels, each token's
    largest one is stored, and how far its others are below it as low and high bytes: a token's
    levels are nearer to each other than to other tokens'.

    Args:
        values: fp32 [M].
        kept: [S], entries of each token.
        draws: samples per token; 0: not sampled.
        steps: of `Levels`; 0: exact values.
    """
    if draws:
        shares = np.exp(values.astype(np.float64)) * draws
        counts = np.rint(shares).astype(np.int64)
        if (counts < 1).any() or (np.abs(shares - counts) > 1e-3 * np.maximum(counts, 1)).any():
            raise ValueError(f"log-probabilities are not counts of {draws} draws")
        classes, below = split(counts)
        return b"", compress(classes.tobytes()), below
    if not steps:
        return b"", values.astype("<f4").tobytes(), b""
    levels = Levels(steps).encode(values)
    base = np.maximum.reduceat(levels, kept.cumsum() - kept)
    below_base = np.repeat(base, kept) - levels
    low, high = (compress((below_base >> shift).astype(np.uint8).tobytes()) for shift in (0, 8))
    return _planes(base.astype("<u2")), low, high


def sums(values: NDArray[Any], kept: Ints) -> NDArray[Any]:
    """Return the sum over each token's entries, [M] -> [S]; every token has at least one."""
    return np.add.reduceat(values, kept.cumsum() - kept) if len(values) else values


def _encode_tail(target: SparseTarget, values: Singles, kept: Ints, *, with_mass: bool) -> bytes:
    """Return log_tail [S] if there is one, then the log of the kept mass [S] if asked, in fp32."""
    columns = [] if target.log_tail is None else [target.log_tail.numpy()]
    if with_mass:
        columns.append(np.log(sums(np.exp(values.astype(np.float64)), kept)).astype(np.float32))
    return _planes(np.concatenate(columns).astype("<f4")) if columns else b""


def _encode_entropy(target: SparseTarget, *, exact: bool) -> bytes:
    if target.entropy is None:
        return b""
    entropy = target.entropy.numpy()
    if exact:
        return _planes(entropy.astype("<f4"))
    return _planes(
        np.minimum(np.rint(entropy.astype(np.float64) * ENTROPY_STEPS), LARGEST).astype("<u2")
    )


def _planes(numbers: NDArray[np.generic]) -> bytes:
    """Return the first byte of every number, then every second byte, and so on, compressed."""
    return compress(numbers.view(np.uint8).reshape(len(numbers), -1).T.tobytes())
