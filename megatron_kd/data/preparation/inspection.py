"""Summarise token files: counts, lengths of documents, and the beginnings of some as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kd.config import ConfigError
from megatron_kd.data.token_file_checks import check_token_file
from megatron_kd.data.token_files import TokenIndex, read_index
from megatron_kd.data.tokenizer import TokenizerInfo
from megatron_kd.data.vocabularies.vocabulary import Vocabulary

_BLOCK_TOKENS = 1 << 24
_SHOWN_IDS = 16


@dataclass(frozen=True)
class Inspection:
    """Hold the summary of a token file.

    Attributes:
        summary: counts and quantiles by name.
        lengths: int64 [documents], tokens of each document that is not empty.
    """

    summary: dict[str, Any]
    lengths: np.ndarray


def inspect_token_file(
    prefix: str, vocab_size: int | None, info: TokenizerInfo | None
) -> Inspection:
    """Check every id of a token file and summarise it.

    Args:
        prefix: path without .bin/.idx.
        vocab_size: number of ids; None to accept every id.
        info: identity of the tokenizer that the file should have been made with, if known.

    Returns:
        The summary.

    Raises:
        ConfigError: the file is damaged, or holds an id outside the vocabulary.
    """
    index = read_index(prefix)
    limit = vocab_size if vocab_size is not None else int(np.iinfo(index.dtype).max) + 1
    digest = info.digest if info else None
    file = check_token_file(prefix, vocab_size=limit, tokenizer_digest=digest, scan_tokens=2**62)
    boundaries = _document_boundaries(index)
    lengths = np.diff(boundaries)
    tokens = np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r")
    blocks = range(0, len(tokens), _BLOCK_TOKENS)
    largest_id = max(int(tokens[start : start + _BLOCK_TOKENS].max()) for start in blocks)
    num_ended = None
    if info is not None and info.end_of_document is not None:
        last_tokens = tokens[boundaries[1:][lengths > 0] - 1]
        num_ended = int((last_tokens == info.end_of_document).sum())
    nonempty = lengths[lengths > 0]
    summary = {
        "prefix": prefix,
        "tokens": file.num_tokens,
        "documents": len(nonempty),
        "empty_documents": int((lengths == 0).sum()),
        "sequences": len(index.lengths),
        "dtype": file.dtype.name,
        "bytes": file.num_tokens * file.dtype.itemsize,
        "largest_id": largest_id,
        "ended_documents": num_ended,
        **_length_statistics(nonempty),
    }
    return Inspection(summary, nonempty)


def _document_boundaries(index: TokenIndex) -> np.ndarray:
    """Return int64 [documents + 1], the first token of each document, and the end of the last."""
    zero = np.zeros(1, np.int64)
    sums = np.concatenate((zero, np.cumsum(index.lengths, dtype=np.int64)))
    boundaries: np.ndarray = sums[index.documents]
    return boundaries


def _length_statistics(lengths: np.ndarray) -> dict[str, float]:
    percentages = (1, 25, 50, 75, 99)
    quantiles = np.quantile(lengths, [p / 100 for p in percentages], method="lower")
    return {
        "length_mean": float(lengths.mean()),
        "length_min": int(lengths.min()),
        "length_max": int(lengths.max()),
        **{
            f"length_p{percentage}": int(value)
            for percentage, value in zip(percentages, quantiles, strict=True)
        },
    }


def length_histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Return (first, last, documents) of ranges of lengths, each twice as long as the last one."""
    exponents = np.floor(np.log2(lengths)).astype(int)
    counts = np.bincount(exponents)
    return [
        (1 << exponent, (2 << exponent) - 1, int(counts[exponent]))
        for exponent in range(int(exponents.min()), len(counts))
    ]


def sample_documents(
    prefix: str, vocabulary: Vocabulary, count: int, characters: int
) -> list[dict[str, Any]]:
    """Return the beginnings of documents, evenly spaced from the first to the last.

    Args:
        prefix: path without .bin/.idx.
        vocabulary: the tokenizer.
        count: number of documents.
        characters: characters of each.

    Returns:
        Number, tokens, first ids and text of each document.
    """
    index = read_index(prefix)
    boundaries = _document_boundaries(index)
    tokens = np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r")
    last = len(index.documents) - 2
    samples = []
    for document in sorted({round(step * last / max(1, count - 1)) for step in range(count)}):
        start, end = int(boundaries[document]), int(boundaries[document + 1])
        ids = [int(token) for token in tokens[start : min(end, start + 4 * characters)]]
        samples.append(
            {
                "document": document,
                "tokens": end - start,
                "ids": ids[:_SHOWN_IDS],
                "text": vocabulary.decode(ids)[:characters],
            }
        )
    return samples


def draw_lengths(inspections: Sequence[Inspection], path: Path) -> None:
    """Draw the histogram of document lengths, one curve per file.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ConfigError(
            "--picture needs matplotlib: pip install 'megatron-kd[report]'"
        ) from error
    figure, axes = pyplot.subplots(figsize=(7, 4))
    longest = max(int(inspection.lengths.max()) for inspection in inspections)
    edges = np.logspace(0, np.log10(longest + 1), 60).tolist()
    for inspection in inspections:
        label = inspection.summary["prefix"]
        axes.hist(inspection.lengths, bins=edges, histtype="step", label=label)
    axes.set(xscale="log", xlabel="tokens of a document", ylabel="documents")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
