"""Digest token files by content, so that a copy at another path counts as the same data.

Two digests exist because files of earlier versions hold both. `token_digest` is stored in
checkpoints and beside captured targets, `token_ends_digest` beside the scores of documents. A run
or a scoring job that an earlier version began continues only if its stored digest can be computed
again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from megatron_kd.data.token_files import read_index
from megatron_kd.storage.sampled_digests import sampled_blocks

_END_BYTES = 1_000_000


def token_digest(prefix: str | Path) -> str:
    """Return the SHA-256, in hex, of all document lengths and sampled blocks of the tokens.

    Use this digest for everything new.
    """
    index = read_index(prefix)
    digest = hashlib.sha256(index.lengths.tobytes())
    for block in sampled_blocks(Path(f"{prefix}.bin"), index.num_tokens * index.dtype.itemsize):
        digest.update(block)
    return digest.hexdigest()


def token_ends_digest(prefix: str | Path) -> str:
    """Return the SHA-256, in hex, of the index and the first and last million bytes of the tokens.

    Only the scores of documents are stored with it.
    """
    digest = hashlib.sha256(Path(f"{prefix}.idx").read_bytes())
    with open(f"{prefix}.bin", "rb") as stream:
        digest.update(stream.read(_END_BYTES))
        size = stream.seek(0, 2)
        stream.seek(max(0, size - _END_BYTES))
        digest.update(stream.read())
    return digest.hexdigest()
