"""Compute sample keys: BLAKE2b of the token ids.

The same text has the same key in any order, batch or layout.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

KEY_BYTES = 16
# Added to the first token of a document inside a sample: the sum is an int32 and not a valid id.
_START = -(2**31)


def mark_starts(tokens: Tensor, starts: Tensor) -> Tensor:
    """Return token ids in which the first token of each further document is negative.

    A sample whose tokens attend within their own document only means something else with other
    document boundaries, so it needs another key.

    Args:
        tokens: int64 [...], ids >= 0.
        starts: bool [...], true where a document begins.

    Returns:
        int64 [...].
    """
    return tokens + starts.to(torch.int64) * _START


def unmark_starts(marked_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the arguments of `mark_starts`: ids int64 [...] and starts bool [...]."""
    starts = marked_tokens < 0
    return marked_tokens - starts.to(torch.int64) * _START, starts


def sample_key(tokens: Tensor) -> bytes:
    """Return the 128-bit BLAKE2b of the input ids [S] as little-endian int32."""
    return blake2b(tokens.cpu().numpy().astype("<i4").tobytes(), digest_size=KEY_BYTES).digest()


def sample_keys(tokens: Tensor) -> Tensor:
    """Return `sample_key` of each sample of [B, S] as two int64: [B, 2], on the CPU."""
    joined = b"".join(sample_key(sample) for sample in tokens)
    return torch.from_numpy(np.frombuffer(joined, dtype="<i8").reshape(-1, 2).copy())


def key_from_words(words: Tensor) -> bytes:
    """Return the key that is stored as the two int64 [2] of `sample_keys`."""
    return words.cpu().numpy().astype("<i8").tobytes()


def token_keys(keys: Tensor, sequence_length: int) -> Tensor:
    """Return what the random samples of a token depend on besides the seed.

    Args:
        keys: int64 [B, 2], `sample_keys`.
        sequence_length: S.

    Returns:
        int64 [S, B], a function of the token's sample and its position in it.
    """
    position = torch.arange(sequence_length, device=keys.device)
    return keys[:, 0].unsqueeze(0) + position.unsqueeze(1)
