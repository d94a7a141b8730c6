"""Check token files before step 0, without importing megatron-core.

megatron-core opens a damaged pair of files without complaint. It fails, or reads the wrong tokens,
when it reaches the damage in the middle of a run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_kd.config import ConfigError
from megatron_kd.data.token_files import (
    PREFIX_ADVICE,
    REBUILD_ADVICE,
    TokenIndex,
    packed_length,
    read_index,
)

_BLOCK_TOKENS = 4_000_000
_NUM_SAMPLED_BLOCKS = 64


@dataclass(frozen=True)
class TokenFile:
    """Describe a checked token file.

    Attributes:
        prefix: path without .bin/.idx.
        num_tokens: ids in the .bin file, end-of-document ids included.
        num_documents: documents.
        dtype: integer type of one id on disk.
    """

    prefix: str
    num_tokens: int
    num_documents: int
    dtype: np.dtype


def check_token_file(
    prefix: str | Path,
    *,
    vocab_size: int,
    tokenizer_digest: str | None = None,
    scan_tokens: int = 64_000_000,
) -> TokenFile:
    """Check one data set before it is used.

    Every rank runs this by itself, without a collective.

    Args:
        prefix: path without .bin/.idx.
        vocab_size: true vocabulary size; every id must be in [0, vocab_size).
        tokenizer_digest: digest of the run's tokenizer, compared with the one in `<prefix>.json` if
            both are known.
        scan_tokens: a file of up to this many tokens is read completely, a larger one in evenly
            spaced blocks of this many tokens in total.

    Returns:
        Sizes and type of the file.

    Raises:
        ConfigError: missing, truncated, oversized or inconsistent files, an id outside the
            vocabulary, or another tokenizer.
    """
    index = read_index(prefix)
    _check_index(f"{prefix}.idx", index)
    num_tokens = index.num_tokens
    _check_size(f"{prefix}.bin", num_tokens, index.dtype)
    if os.path.exists(f"{prefix}.roles"):
        _check_size(f"{prefix}.roles", num_tokens, np.dtype(np.uint8))
    elif packed_length(prefix) is not None:
        raise ConfigError(
            f"{prefix}.roles is missing, without which the loss would count on every token: "
            f"copy it too, or {REBUILD_ADVICE}"
        )
    _check_description(prefix, num_tokens, vocab_size, tokenizer_digest)
    _check_ids(prefix, index, vocab_size, scan_tokens)
    return TokenFile(str(prefix), num_tokens, len(index.documents) - 1, index.dtype)


def _check_index(path: str, index: TokenIndex) -> None:
    """Check that lengths, offsets and document marks describe one file without gaps.

    The index is read in blocks, so that memory stays bounded.
    """
    expected = 0
    for start in range(0, len(index.lengths), _BLOCK_TOKENS):
        lengths = index.lengths[start : start + _BLOCK_TOKENS]
        ends = expected + np.cumsum(lengths, dtype=np.int64) * index.dtype.itemsize
        begins = ends - lengths.astype(np.int64) * index.dtype.itemsize
        offsets = index.offsets[start : start + _BLOCK_TOKENS]
        if lengths.min() < 0 or not np.array_equal(begins, offsets):
            raise ConfigError(
                f"{path} is damaged: its lengths and offsets disagree; {REBUILD_ADVICE}"
            )
        expected = int(ends[-1])
    marks = index.documents
    if marks[0] != 0 or marks[-1] != len(index.lengths) or (np.diff(marks) < 0).any():
        raise ConfigError(
            f"{path} is damaged: its document marks do not cover its {len(index.lengths)} "
            f"sequences; {REBUILD_ADVICE}"
        )


def _check_size(path: str, num_tokens: int, dtype: np.dtype) -> None:
    try:
        size = os.path.getsize(path)
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror}): {PREFIX_ADVICE}") from error
    expected = num_tokens * dtype.itemsize
    if size != expected:
        problem = "truncated" if size < expected else "oversized"
        raise ConfigError(
            f"{path} is {problem}: it has {size} bytes and its index needs {expected}; "
            f"{REBUILD_ADVICE}"
        )
    if not num_tokens:
        raise ConfigError(f"{path} holds no tokens: {REBUILD_ADVICE}")


def _check_description(
    prefix: str | Path, num_tokens: int, vocab_size: int, tokenizer_digest: str | None
) -> None:
    """Compare `<prefix>.json` with the tokens; files made by other programs have none."""
    path = Path(f"{prefix}.json")
    if not path.exists():
        return
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        digest = str(description["tokenizer_digest"])
        described_tokens = int(description["tokens"])
        max_id = int(description["max_id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} does not describe token data ({type(error).__name__}: {error}): "
            f"{REBUILD_ADVICE}, or move it away if it is something else"
        ) from error
    if tokenizer_digest is not None and digest != tokenizer_digest:
        raise ConfigError(
            f"{prefix} was made with another tokenizer: its digest is {digest}, that of the run's "
            f"tokenizer is {tokenizer_digest}; set data.tokenizer to the one that made the data, "
            "or make the data again"
        )
    if described_tokens != num_tokens:
        raise ConfigError(
            f"{path} describes {described_tokens} tokens, but {prefix}.bin holds {num_tokens}: "
            f"{REBUILD_ADVICE}"
        )
    if max_id >= vocab_size:
        raise ConfigError(
            f"{prefix}.bin holds token id {max_id}, but the vocabulary has {vocab_size} ids: "
            f"{_vocabulary_advice(vocab_size)}"
        )


def _vocabulary_advice(vocab_size: int) -> str:
    return (
        "set model.vocab_size above it, "
        f"or make the data with a tokenizer of at most {vocab_size} ids"
    )


def _check_ids(prefix: str | Path, index: TokenIndex, vocab_size: int, scan_tokens: int) -> None:
    """Check that every id that is read is in [0, vocab_size)."""
    limits = np.iinfo(index.dtype)
    if limits.min >= 0 and limits.max < vocab_size:
        return
    tokens = np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r")
    for start, end in _scan_ranges(len(tokens), scan_tokens):
        block = tokens[start:end]
        if block.min() < 0 or block.max() >= vocab_size:
            position = start + int(np.argmax((block < 0) | (block >= vocab_size)))
            document, offset = _locate(index, position)
            raise ConfigError(
                f"{prefix}.bin holds token id {tokens[position]} (document {document}, position "
                f"{offset}), outside the vocabulary of {vocab_size} ids: "
                f"{_vocabulary_advice(vocab_size)}"
            )


def _scan_ranges(num_tokens: int, scan_tokens: int) -> Iterator[tuple[int, int]]:
    """Yield half-open token ranges to read.

    These are all blocks of a small file, or evenly spaced blocks from first token to last.
    """
    if num_tokens <= scan_tokens:
        for start in range(0, num_tokens, _BLOCK_TOKENS):
            yield start, min(start + _BLOCK_TOKENS, num_tokens)
        return
    size = max(1, scan_tokens // _NUM_SAMPLED_BLOCKS)
    count = max(1, min(_NUM_SAMPLED_BLOCKS, scan_tokens // size))
    for block in range(count):
        start = (num_tokens - size) * block // max(1, count - 1)
        yield start, start + size


def _locate(index: TokenIndex, position: int) -> tuple[int, int]:
    """Return the document of the token at `position` of the file, and its position in it.

    Both count from 0.
    """
    byte = position * index.dtype.itemsize
    sequence = int(np.searchsorted(index.offsets, byte, side="right")) - 1
    document = int(np.searchsorted(index.documents, sequence, side="right")) - 1
    document_byte = int(index.offsets[index.documents[document]])
    return document, (byte - document_byte) // index.dtype.itemsize
