"""Read Megatron's token files and the description beside them.

`<prefix>.bin` holds the ids back to back, `<prefix>.idx` the lengths of sequences. Ours is
`<prefix>.json`, which describes the data, and `<prefix>.roles`, which marks tokens of packed
conversations. Layout of `.idx`, little-endian: magic (9 bytes), version (uint64, 1), type code
(uint8), sequences S (uint64), document marks D (uint64), lengths (int32 [S]), byte offsets
(int64 [S]), document marks (int64 [D]: 0, then the number of sequences up to the end of each
document).
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_kd.config import ConfigError

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES: dict[int, np.dtype] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
REBUILD_ADVICE = "make it again with tools/preprocess_data.py"
PREFIX_ADVICE = "give a data prefix that has a .bin and an .idx file"
# Bits of one byte of `<prefix>.roles`.
COUNTS_FOR_LOSS, STARTS_DOCUMENT = 1, 2


@dataclass(frozen=True)
class TokenIndex:
    """Hold the content of an .idx file, memory-mapped.

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
        """Number of ids in the .bin file."""
        return int(self.lengths.sum(dtype=np.int64))


def optimal_dtype(vocab_size: int) -> np.dtype:
    """Return the type megatron-core uses for a vocabulary: uint16 below 65,500 ids, else int32."""
    return _DTYPES[8] if vocab_size < 65500 else _DTYPES[4]


def index_header(dtype: np.dtype, num_sequences: int, num_marks: int) -> bytes:
    """Return the beginning of an .idx file: everything before the lengths."""
    code = next(code for code, id_dtype in _DTYPES.items() if id_dtype == dtype)
    return _HEADER.pack(_MAGIC, 1, code, num_sequences, num_marks)


def read_index(prefix: str | Path) -> TokenIndex:
    """Map `<prefix>.idx` after checking its size against its header.

    Raises:
        ConfigError: the file is missing, truncated, or no Megatron index.
    """
    path = f"{prefix}.idx"
    size, code, num_sequences, num_marks = _read_header(path)
    expected = _HEADER.size + 12 * num_sequences + 8 * num_marks
    if size != expected:
        raise ConfigError(
            f"{path} has {size} bytes, but its header ({num_sequences} sequences, {num_marks} "
            f"marks) needs {expected}: {REBUILD_ADVICE}"
        )
    if not num_sequences or not num_marks:
        raise ConfigError(f"{path} lists no documents: {REBUILD_ADVICE}")
    content = np.memmap(path, dtype=np.uint8, mode="r")
    start = _HEADER.size
    return TokenIndex(
        _DTYPES[code],
        lengths=np.frombuffer(content, "<i4", num_sequences, start),
        offsets=np.frombuffer(content, "<i8", num_sequences, start + 4 * num_sequences),
        documents=np.frombuffer(content, "<i8", num_marks, start + 12 * num_sequences),
    )


def _read_header(path: str) -> tuple[int, int, int, int]:
    """Return the size of an .idx file in bytes, its type code, sequences and document marks."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as stream:
            header = stream.read(_HEADER.size)
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror}): {PREFIX_ADVICE}") from error
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise ConfigError(f"{path} has no Megatron index header ({size} bytes): {REBUILD_ADVICE}")
    _, version, code, num_sequences, num_marks = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise ConfigError(
            f"{path} has version {version} and type code {code}, which is no integer token file: "
            f"{REBUILD_ADVICE}"
        )
    return size, code, num_sequences, num_marks


def read_roles(prefix: str | Path) -> np.ndarray | None:
    """Map `<prefix>.roles`: uint8 [tokens].

    Bit COUNTS_FOR_LOSS: the loss counts if this token is the label. Bit STARTS_DOCUMENT: a document
    starts with this token. None if there is no such file: every token counts, and documents are
    those of the index.
    """
    path = f"{prefix}.roles"
    return np.memmap(path, dtype=np.uint8, mode="r") if os.path.exists(path) else None


def packed_length(prefix: str | Path) -> int | None:
    """Return the tokens of a sample of packed conversations; None for plain text.

    tools/preprocess_instructions.py packs whole conversations into samples of one length. An
    unreadable description counts as plain text; `check_token_file` reports it.
    """
    try:
        return int(json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))["packed_length"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def tokens_per_byte(prefix: str | Path) -> float | None:
    """Return the tokens per byte of plain text, end-of-document ids included.

    None if the description does not record it, or if the file holds packed conversations.
    """
    try:
        description = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
        if description.get("packed_length") is not None or not description["bytes"] > 0:
            return None
        return float(description["tokens"]) / float(description["bytes"])
    except (OSError, ValueError, KeyError, TypeError):  # made by another program
        return None
