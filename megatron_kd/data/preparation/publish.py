"""Join files of ids and lengths into one token file that is complete or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kd.data.token_files import index_header
from megatron_kd.storage.atomic_files import sync_path, write_atomically

_BLOCK_BYTES = 1 << 20


def publish(
    prefix: Path,
    dtype: np.dtype,
    ids: Sequence[Path],
    lengths: Sequence[Path],
    description: dict[str, Any],
    roles: Sequence[Path] = (),
) -> None:
    """Join files as `prefix`.bin, .idx, .json and .roles.

    The old index is removed first and the new one written last, so that an interruption never pairs
    an index with tokens of another file. The description is written before the tokens: it tells the
    same job, run again, that they are its own.

    Args:
        prefix: path without .bin/.idx.
        dtype: integer type of the ids.
        ids: files of ids.
        lengths: files of document lengths, int32; 0 stands for an empty document.
        description: content of the .json.
        roles: files of roles, uint8, if the tokens have any.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    temporary = {
        kind: prefix.with_name(f".{prefix.name}.{kind}.partial-{os.getpid()}")
        for kind in ("bin", "roles", "idx")
    }
    try:
        for kind, paths in (("bin", ids), ("roles", roles)):
            if paths:
                _join(paths, temporary[kind])
        with open(temporary["idx"], "wb") as stream:
            for block in _index_blocks(dtype, lengths):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
        for ending in ("idx", "roles"):
            Path(f"{prefix}.{ending}").unlink(missing_ok=True)
        write_atomically(f"{prefix}.json", (json.dumps(description, indent=2) + "\n").encode())
        for kind in ("bin", "roles") if roles else ("bin",):
            os.replace(temporary[kind], f"{prefix}.{kind}")
        os.replace(temporary["idx"], f"{prefix}.idx")
        sync_path(prefix.parent)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _join(paths: Sequence[Path], output: Path) -> None:
    with open(output, "wb") as target:
        for path in paths:
            with open(path, "rb") as source:
                shutil.copyfileobj(source, target, _BLOCK_BYTES)
        target.flush()
        os.fsync(target.fileno())


def _index_blocks(dtype: np.dtype, paths: Sequence[Path]) -> Iterator[bytes]:
    """Yield an .idx file in blocks.

    It has a header, the lengths and offsets of sequences, and per document the number of sequences
    up to its end. An empty document has a mark and no sequence.
    """
    num_documents = sum(map(len, _length_blocks(paths)))
    num_sequences = sum(int((block > 0).sum()) for block in _length_blocks(paths))
    yield index_header(dtype, num_sequences, num_documents + 1)
    for block in _length_blocks(paths):
        yield block[block > 0].tobytes()
    tokens = 0
    for block in _length_blocks(paths):
        ends = tokens + np.cumsum(block[block > 0], dtype=np.int64)
        yield ((ends - block[block > 0]) * dtype.itemsize).astype("<i8").tobytes()
        tokens = int(ends[-1]) if len(ends) else tokens
    yield np.zeros(1, "<i8").tobytes()
    sequences = 0
    for block in _length_blocks(paths):
        marks = sequences + np.cumsum(block > 0, dtype=np.int64)
        yield marks.astype("<i8").tobytes()
        sequences = int(marks[-1]) if len(marks) else sequences


def _length_blocks(paths: Sequence[Path]) -> Iterator[np.ndarray]:
    for path in paths:
        with open(path, "rb") as stream:
            while data := stream.read(_BLOCK_BYTES):
                yield np.frombuffer(data, "<i4")
