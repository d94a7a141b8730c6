"""Compute which vocabulary rows a tensor-parallel rank stores."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VocabShard:
    """Describe the vocabulary rows [start, start + valid) of one rank.

    Attributes:
        start: First id of the shard.
        valid: Rows with an id. The other rows are padding: they take no probability and get exactly
            zero gradient.
        rows: Rows that the rank stores.
        vocab_size: True number of ids over all ranks.
        share: vocab_size over the number of ranks, rounded up. Chunk sizes that depend on the
            vocabulary depend on it, so that all ranks chunk alike, however the vocabulary is
            padded.
    """

    start: int
    valid: int
    rows: int
    vocab_size: int
    share: int


def vocab_shard(rows: int, *, rank: int, size: int, vocab_size: int | None) -> VocabShard:
    """Return the shard of a rank when every rank stores as many rows, in id order.

    Args:
        rows: Rows that each rank stores.
        rank: Rank in the tensor-parallel group.
        size: Ranks of the group.
        vocab_size: True number of ids; None for rows * size, without padding.

    Raises:
        ValueError: The shards cannot hold the vocabulary.
    """
    if vocab_size is None:
        vocab_size = rows * size
    if not 0 < vocab_size <= rows * size:
        raise ValueError(
            f"vocab_size ({vocab_size}) must be in [1, {rows * size}]: {size} rank(s) hold {rows} "
            "vocabulary rows each"
        )
    start = rank * rows
    return VocabShard(
        start=start,
        valid=min(max(vocab_size - start, 0), rows),
        rows=rows,
        vocab_size=vocab_size,
        share=-(-vocab_size // size),
    )


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that holds `vocab_size` ids."""
    return -(-vocab_size // multiple) * multiple
