"""Digest samples of large files, so that terabytes are identified without reading them whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_NUM_BLOCKS, _BLOCK_BYTES = 64, 1 << 16


def sampled_blocks(path: Path, size: int) -> Iterator[bytes]:
    """Yield 64 evenly spaced blocks of 64 KiB from the first `size` bytes of a file.

    Files that are smaller than all blocks together are covered completely.
    """
    last = max(size - _BLOCK_BYTES, 0)
    with open(path, "rb") as stream:
        for start in sorted({int(start) for start in np.linspace(0, last, _NUM_BLOCKS)}):
            stream.seek(start)
            yield stream.read(_BLOCK_BYTES)


def sampled_folder_digest(folder: Path) -> str:
    """Return the SHA-256, in hex, of names, sizes and sampled blocks of all files of a folder."""
    digest = hashlib.sha256()
    for path in sorted(
        path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".nfs")
    ):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        for block in sampled_blocks(path, path.stat().st_size):
            digest.update(block)
    return digest.hexdigest()
