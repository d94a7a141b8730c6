"""What a sample is called: a hash of its token ids, so that the same text has the same name in any order, batch or layout."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

KEY_BYTES = 16
# Added to the first token of a document inside a sample: still an int32, and no id.
_START = -(2**31)


def mark_starts(tokens: Tensor, starts: Tensor) -> Tensor:
    """Token ids with the first token of each further document made negative, so that a name says where documents begin.

    A sample whose tokens see their own document only means something else with other beginnings, and needs another name.

    Args:
        tokens: int64 [...], ids >= 0.
        starts: bool [...], true where a document begins.
    """
    return tokens + starts.to(torch.int64) * _START


def unmark_starts(named: Tensor) -> tuple[Tensor, Tensor]:
    """What `mark_starts` was given: ids int64 [...] and starts bool [...]."""
    starts = named < 0
    return named - starts.to(torch.int64) * _START, starts


def sample_key(tokens: Tensor) -> bytes:
    """128-bit BLAKE2b of the input ids [S] as little-endian int32."""
    return blake2b(tokens.cpu().numpy().astype("<i4").tobytes(), digest_size=KEY_BYTES).digest()


def sample_keys(tokens: Tensor) -> Tensor:
    """`sample_key` of each row of [B, S] as two int64: [B, 2], on the CPU."""
    joined = b"".join(sample_key(row) for row in tokens)
    return torch.from_numpy(np.frombuffer(joined, dtype="<i8").reshape(-1, 2).copy())


def key_from_words(words: Tensor) -> bytes:
    """The two int64 of `sample_keys` [2] as the key again."""
    return words.cpu().numpy().astype("<i8").tobytes()


def token_keys(keys: Tensor, sequence_length: int) -> Tensor:
    """int64 [S, B], what random draws of a token depend on besides the seed: its sample [B, 2] and its position in it."""
    position = torch.arange(sequence_length, device=keys.device)
    return keys[:, 0].unsqueeze(0) + position.unsqueeze(1)
