"""Files of ids and lengths, put together as one token file that is complete or absent under its names."""

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

_COPIED = 1 << 20


def publish(
    prefix: Path,
    dtype: np.dtype,
    ids: Sequence[Path],
    lengths: Sequence[Path],
    description: dict[str, Any],
    roles: Sequence[Path] = (),
) -> None:
    """Put files of ids, of document lengths and of roles, if any, together as `prefix`.bin, .idx, .json and .roles.

    The old index goes first and the new one comes last, so that an interruption never pairs an index with foreign tokens. The
    description comes before the tokens: it tells the same job, run again, that what lies there is its own.
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
        with open(temporary["idx"], "wb") as target:
            for block in _index_blocks(dtype, lengths):
                target.write(block)
            target.flush()
            os.fsync(target.fileno())
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
                shutil.copyfileobj(source, target, _COPIED)
        target.flush()
        os.fsync(target.fileno())


def _index_blocks(dtype: np.dtype, paths: Sequence[Path]) -> Iterator[bytes]:
    """An .idx file in blocks: header, lengths and offsets of sequences, and per document the sequences up to its end."""

    def blocks() -> Iterator[np.ndarray]:
        for path in paths:
            with open(path, "rb") as stream:
                while data := stream.read(_COPIED):
                    yield np.frombuffer(data, "<i4")

    num_documents = sum(map(len, blocks()))
    num_sequences = sum(int((block > 0).sum()) for block in blocks())
    yield index_header(dtype, num_sequences, num_documents + 1)
    for block in blocks():
        yield block[block > 0].tobytes()
    start = 0
    for block in blocks():
        ends = start + np.cumsum(block[block > 0], dtype=np.int64)
        yield ((ends - block[block > 0]) * dtype.itemsize).astype("<i8").tobytes()
        start = int(ends[-1]) if len(ends) else start
    yield np.zeros(1, "<i8").tobytes()
    start = 0
    for block in blocks():
        marks = start + np.cumsum(block > 0, dtype=np.int64)
        yield marks.astype("<i8").tobytes()
        start = int(marks[-1]) if len(marks) else start
