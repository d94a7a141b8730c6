"""Megatron's token files: `<prefix>.bin` (ids back to back), `<prefix>.idx` (lengths), and our `<prefix>.json` beside them.

megatron-core opens a damaged pair without complaint and fails, or reads the wrong tokens, when it meets the damage in the
middle of a run. `check_token_file` finds it before step 0, without importing megatron-core. Layout of `.idx`, little-endian:
magic (9 bytes), version (uint64, 1), type code (uint8), sequences S (uint64), document marks D (uint64), lengths (int32 [S]),
byte offsets (int64 [S]), document marks (int64 [D]: 0, then the number of sequences up to the end of each document).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_kd.config import ConfigError
from megatron_kd.storage.atomic_files import write_atomically

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES: dict[int, np.dtype] = {
    1: np.dtype(np.uint8), 2: np.dtype(np.int8), 3: np.dtype(np.int16), 4: np.dtype("<i4"), 5: np.dtype("<i8"), 8: np.dtype("<u2"),
}  # fmt: skip
_BLOCK = 4_000_000
_SAMPLED_BLOCKS = 64
_REBUILD = "make it again with tools/preprocess_data.py"
# What a byte of `<prefix>.roles` says of a token, where there is such a file.
COUNTS_FOR_LOSS, STARTS_DOCUMENT = 1, 2


@dataclass(frozen=True)
class TokenFile:
    """A checked token file.

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


@dataclass(frozen=True)
class TokenIndex:
    """The content of an .idx file, memory-mapped.

    Attributes:
        dtype: integer type of one id in the .bin file.
        lengths: int32 [S], tokens of each sequence.
        offsets: int64 [S], first byte of each sequence in the .bin file.
        documents: int64 [D + 1], index of the first sequence of each document, and S at the end.
    """

    dtype: np.dtype
    lengths: np.ndarray
    offsets: np.ndarray
    documents: np.ndarray

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))


def optimal_dtype(vocab_size: int) -> np.dtype:
    """The smallest type megatron-core uses for this vocabulary: uint16 below 65,500 ids, else int32."""
    return _DTYPES[8] if vocab_size < 65500 else _DTYPES[4]


def index_header(dtype: np.dtype, num_sequences: int, num_marks: int) -> bytes:
    """The beginning of an .idx file: everything before the lengths."""
    code = next(code for code, known in _DTYPES.items() if known == dtype)
    return _HEADER.pack(_MAGIC, 1, code, num_sequences, num_marks)


def read_index(prefix: str | Path) -> TokenIndex:
    """Map `<prefix>.idx`; its size is checked against its header before anything of it is read.

    Raises:
        ConfigError: missing, foreign, or truncated.
    """
    path = f"{prefix}.idx"
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as stream:
            header = stream.read(_HEADER.size)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path} ({error.strerror}): give a data prefix that has a .bin and an .idx file"
        ) from error
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise ConfigError(f"{path} has no Megatron index header ({size} bytes): {_REBUILD}")
    _, version, code, sequences, marks = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise ConfigError(
            f"{path} has version {version} and type code {code}, which is no integer token file: {_REBUILD}"
        )
    needed = _HEADER.size + 12 * sequences + 8 * marks
    if size != needed:
        raise ConfigError(
            f"{path} has {size} bytes, but its header ({sequences} sequences, {marks} marks) needs {needed}: {_REBUILD}"
        )
    if not sequences or not marks:
        raise ConfigError(f"{path} lists no documents: {_REBUILD}")
    first = _HEADER.size
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    lengths = np.frombuffer(raw, "<i4", sequences, first)
    offsets = np.frombuffer(raw, "<i8", sequences, first + 4 * sequences)
    return TokenIndex(
        _DTYPES[code], lengths, offsets, np.frombuffer(raw, "<i8", marks, first + 12 * sequences)
    )


def read_roles(prefix: str | Path) -> np.ndarray | None:
    """`<prefix>.roles`: uint8 [tokens], memory-mapped; None where every token counts and documents are those of the index.

    Bit 0: the loss counts where this token is the label. Bit 1: a document begins with this token.
    """
    path = f"{prefix}.roles"
    return np.memmap(path, dtype=np.uint8, mode="r") if os.path.exists(path) else None


def packed_length(prefix: str | Path) -> int | None:
    """Tokens of a sample into which whole conversations were packed (tools/preprocess_instructions.py); None for plain text."""
    path = Path(f"{prefix}.json")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["packed_length"]
        return int(found)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ):  # `check_token_file` says what is wrong with it
        return None


def tokens_per_byte(prefix: str | Path) -> float | None:
    """Of plain text, end-of-document ids included; None where the file's description does not say, or conversations are packed in it."""
    try:
        found = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
        return (
            float(found["tokens"]) / float(found["bytes"])
            if found.get("packed_length") is None and found["bytes"] > 0
            else None
        )
    except (OSError, ValueError, KeyError, TypeError):  # made elsewhere
        return None


def check_token_file(
    prefix: str | Path,
    *,
    vocab_size: int,
    tokenizer_digest: str | None = None,
    scan_tokens: int = 64_000_000,
) -> TokenFile:
    """Check one data set before it is used; every rank runs it by itself, with no collective.

    Args:
        prefix: path without .bin/.idx.
        vocab_size: true vocabulary size; every id must be in [0, vocab_size).
        tokenizer_digest: digest of the run's tokenizer, compared with the one in `<prefix>.json` where both are known.
        scan_tokens: ids are all read up to this many tokens; of a larger file, that many in evenly spaced blocks.

    Raises:
        ConfigError: missing, truncated, oversized or inconsistent files, an id outside the vocabulary, another tokenizer.
    """
    index = read_index(prefix)
    _check_index(f"{prefix}.idx", index)
    num_tokens = index.num_tokens
    _check_size(f"{prefix}.bin", num_tokens, index.dtype)
    if os.path.exists(f"{prefix}.roles"):
        _check_size(f"{prefix}.roles", num_tokens, np.dtype(np.uint8))
    elif packed_length(prefix) is not None:
        raise ConfigError(
            f"{prefix}.roles is missing, without which the loss would count on every token: copy it too, or {_REBUILD}"
        )
    _check_sidecar(prefix, num_tokens, vocab_size, tokenizer_digest)
    _check_ids(prefix, index, num_tokens, vocab_size, scan_tokens)
    return TokenFile(str(prefix), num_tokens, len(index.documents) - 1, index.dtype)


def _check_index(path: str, index: TokenIndex) -> None:
    """Lengths, offsets and document marks must describe one gapless file; read in blocks, so memory stays bounded."""
    expected = 0
    for start in range(0, len(index.lengths), _BLOCK):
        lengths = index.lengths[start : start + _BLOCK]
        ends = expected + np.cumsum(lengths, dtype=np.int64) * index.dtype.itemsize
        begins = ends - lengths.astype(np.int64) * index.dtype.itemsize
        if lengths.min() < 0 or not np.array_equal(begins, index.offsets[start : start + _BLOCK]):
            raise ConfigError(f"{path} is damaged: its lengths and offsets disagree; {_REBUILD}")
        expected = int(ends[-1])
    marks = index.documents
    if marks[0] != 0 or marks[-1] != len(index.lengths) or (np.diff(marks) < 0).any():
        raise ConfigError(
            f"{path} is damaged: its document marks do not cover its {len(index.lengths)} sequences; {_REBUILD}"
        )


def _check_size(path: str, num_tokens: int, dtype: np.dtype) -> None:
    try:
        size = os.path.getsize(path)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path} ({error.strerror}): give a data prefix that has a .bin and an .idx file"
        ) from error
    expected = num_tokens * dtype.itemsize
    if size != expected:
        what = "truncated" if size < expected else "oversized"
        raise ConfigError(
            f"{path} is {what}: it has {size} bytes and its index needs {expected}; {_REBUILD}"
        )
    if not num_tokens:
        raise ConfigError(f"{path} holds no tokens: {_REBUILD}")


def _check_sidecar(
    prefix: str | Path, num_tokens: int, vocab_size: int, tokenizer_digest: str | None
) -> None:
    """Files made elsewhere have no sidecar: then there is nothing to compare."""
    path = Path(f"{prefix}.json")
    if not path.exists():
        return
    try:
        sidecar = json.loads(path.read_text(encoding="utf-8"))
        digest, tokens, max_id = (
            str(sidecar["tokenizer_digest"]),
            int(sidecar["tokens"]),
            int(sidecar["max_id"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} does not describe token data ({type(error).__name__}: {error}): {_REBUILD}, or move it away if it is something else"
        ) from error
    if tokenizer_digest is not None and digest != tokenizer_digest:
        raise ConfigError(
            f"{prefix} was made with another tokenizer: its digest is {digest}, that of the run's tokenizer is {tokenizer_digest}; "
            "set data.tokenizer to the one that made the data, or make the data again"
        )
    if tokens != num_tokens:
        raise ConfigError(
            f"{path} describes {tokens} tokens, but {prefix}.bin holds {num_tokens}: {_REBUILD}"
        )
    if max_id >= vocab_size:
        raise ConfigError(
            f"{prefix}.bin holds token id {max_id}, but the vocabulary has {vocab_size} ids: {_advice(vocab_size)}"
        )


def _advice(vocab_size: int) -> str:
    return f"set model.vocab_size above it, or make the data with a tokenizer of at most {vocab_size} ids"


def _scan_ranges(num_tokens: int, scan_tokens: int) -> Iterator[tuple[int, int]]:
    """Half-open token ranges to read: all of the file in blocks, or evenly spaced blocks from first token to last."""
    if num_tokens <= scan_tokens:
        yield from (
            (start, min(start + _BLOCK, num_tokens)) for start in range(0, num_tokens, _BLOCK)
        )
        return
    size = max(1, scan_tokens // _SAMPLED_BLOCKS)
    count = max(1, min(_SAMPLED_BLOCKS, scan_tokens // size))
    for block in range(count):
        start = (num_tokens - size) * block // max(1, count - 1)
        yield start, start + size


def _check_ids(
    prefix: str | Path, index: TokenIndex, num_tokens: int, vocab_size: int, scan_tokens: int
) -> None:
    """Every id read must be in [0, vocab_size)."""
    info = np.iinfo(index.dtype)
    if info.min >= 0 and info.max < vocab_size:
        return
    tokens = np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r")
    for start, end in _scan_ranges(num_tokens, scan_tokens):
        block = tokens[start:end]
        if block.min() < 0 or block.max() >= vocab_size:
            position = start + int(np.argmax((block < 0) | (block >= vocab_size)))
            document, within = _locate(index, position)
            raise ConfigError(
                f"{prefix}.bin holds token id {tokens[position]} (document {document}, position {within}), "
                f"outside the vocabulary of {vocab_size} ids: {_advice(vocab_size)}"
            )


def _locate(index: TokenIndex, position: int) -> tuple[int, int]:
    """Document of the token at `position` of the file, and its position in that document; both count from 0."""
    at = position * index.dtype.itemsize
    sequence = int(np.searchsorted(index.offsets, at, side="right")) - 1
    document = int(np.searchsorted(index.documents, sequence, side="right")) - 1
    return document, (at - int(index.offsets[index.documents[document]])) // index.dtype.itemsize


class TokenFileWriter:
    """Writes one .bin/.idx/.json set that appears under its names only when it is complete.

    Use as a context manager; without `commit`, or after an exception, nothing is left behind.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self.prefix = Path(prefix)
        self.dtype = dtype
        self.num_tokens = 0
        self.max_id = -1
        self._lengths: list[np.ndarray] = []
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self.prefix.with_name(f".{self.prefix.name}.bin.partial-{os.getpid()}")
        self._bin = open(self._temporary, "wb")  # noqa: SIM115  closed in __exit__

    @property
    def num_documents(self) -> int:
        return sum(map(len, self._lengths))

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append whole documents.

        Args:
            tokens: integer [sum(lengths)], the documents back to back.
            lengths: integer [documents], tokens of each.

        Raises:
            ValueError: the lengths do not sum to the tokens, or an id does not fit the type on disk.
        """
        if int(lengths.sum()) != len(tokens):
            raise ValueError(
                f"lengths sum to {int(lengths.sum())}, but there are {len(tokens)} tokens"
            )
        if not len(tokens):
            return
        if tokens.min() < 0 or tokens.max() > np.iinfo(self.dtype).max:
            raise ValueError(f"token ids {tokens.min()}..{tokens.max()} do not fit {self.dtype}")
        self._bin.write(tokens.astype(self.dtype, copy=False).tobytes())
        self._lengths.append(lengths.astype("<i4"))
        self.num_tokens += len(tokens)
        self.max_id = max(self.max_id, int(tokens.max()))

    def commit(self, **description: Any) -> dict[str, Any]:
        """Publish the files and return the sidecar: `description`, tokens, documents, max_id and dtype.

        The old index goes first and the new one comes last, so that an interruption never pairs an index with foreign tokens.
        """
        sidecar = description | {
            "tokens": self.num_tokens, "documents": self.num_documents, "max_id": self.max_id, "dtype": self.dtype.name,
        }  # fmt: skip
        self._bin.flush()
        os.fsync(self._bin.fileno())
        self._bin.close()
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        os.replace(self._temporary, f"{self.prefix}.bin")
        write_atomically(f"{self.prefix}.json", (json.dumps(sidecar, indent=2) + "\n").encode())
        write_atomically(f"{self.prefix}.idx", self._index())
        return sidecar

    def _index(self) -> bytes:
        lengths = np.concatenate([*self._lengths, np.empty(0, "<i4")])
        ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        offsets = (ends - lengths.astype(np.int64) * self.dtype.itemsize).astype("<i8")
        header = index_header(self.dtype, len(lengths), len(lengths) + 1)
        return b"".join(
            (
                header,
                lengths.tobytes(),
                offsets.tobytes(),
                np.arange(len(lengths) + 1, dtype="<i8").tobytes(),
            )
        )

    def __enter__(self) -> TokenFileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bin.close()
        self._temporary.unlink(missing_ok=True)
