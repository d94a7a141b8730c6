"""Which vocabulary rows a tensor-parallel rank holds, and which layers a pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VocabShard:
    """Rows [start, start + valid) of the vocabulary, the first `valid` of the `rows` this rank stores.

    The remaining rows are padding: they take no probability and get exactly zero gradient. share: vocab_size over the number
    of ranks, rounded up; whatever is sized by the vocabulary is sized by it, so that all ranks cut their work alike, however
    the vocabulary is padded.
    """

    start: int
    valid: int
    rows: int
    vocab_size: int
    share: int


def vocab_shard(rows: int, *, rank: int, size: int, vocab_size: int | None) -> VocabShard:
    """The shard of `rank` when every one of `size` ranks stores `rows` rows in id order.

    `vocab_size` is the true number of ids (None: rows * size, no padding). Raises ValueError where the shards
    cannot hold it.
    """
    if vocab_size is None:
        vocab_size = rows * size
    if not 0 < vocab_size <= rows * size:
        raise ValueError(
            f"vocab_size ({vocab_size}) must be in [1, {rows * size}]: {size} rank(s) hold {rows} vocabulary rows each"
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
    """Smallest multiple of `multiple` that holds `vocab_size` ids."""
    return -(-vocab_size // multiple) * multiple


def stage_of(layer: int, num_layers: int, *, pipeline: int, virtual: int = 1) -> int:
    """The pipeline stage that holds `layer` (counted from 1) where every chunk has as many layers; interleaved for `virtual` > 1."""
    return (layer - 1) * pipeline * virtual // num_layers % pipeline
