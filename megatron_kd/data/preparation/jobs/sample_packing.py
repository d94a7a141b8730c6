"""Pack whole conversations into samples of one length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_kd.data.token_files import STARTS_DOCUMENT


@dataclass(frozen=True)
class PackedSample:
    """Hold one sample of S tokens.

    Attributes:
        ids: integer [S].
        roles: uint8 [S], see `read_roles`.
        conversations: number of conversations in it.
    """

    ids: np.ndarray
    roles: np.ndarray
    conversations: int


class Packer:
    """Place whole conversations side by side in samples (best fit).

    Each conversation goes to the sample with the least free space that can hold it. Remaining space
    is filled with padding, as a separate document without loss.

    Args:
        length: tokens of a sample.
        padding: id that fills samples up.
        dtype: integer type of the ids.
        open_samples: samples that are filled at the same time, at most.
    """

    def __init__(self, length: int, padding: int, dtype: np.dtype, open_samples: int = 64) -> None:
        self.length, self.padding, self.dtype = length, padding, dtype
        self.open_samples = open_samples
        self._samples: list[list[tuple[np.ndarray, np.ndarray]]] = []
        self._free: list[int] = []

    def add(self, ids: np.ndarray, roles: np.ndarray) -> PackedSample | None:
        """Add one conversation.

        Args:
            ids: integer [N], N at most `length`.
            roles: uint8 [N].

        Returns:
            The sample with the most tokens, if it had to be closed to make room, else None.
        """
        closed = None
        candidates = [index for index, free in enumerate(self._free) if free >= len(ids)]
        if candidates:
            index = min(candidates, key=lambda candidate: self._free[candidate])
        else:
            if len(self._samples) == self.open_samples:
                closed = self._close(self._free.index(min(self._free)))
            self._samples.append([])
            self._free.append(self.length)
            index = len(self._samples) - 1
        self._samples[index].append((ids, roles))
        self._free[index] -= len(ids)
        return closed

    def finish(self) -> Iterator[PackedSample]:
        """Yield the samples that are still open."""
        while self._samples:
            yield self._close(0)

    def _close(self, index: int) -> PackedSample:
        conversations, free = self._samples.pop(index), self._free.pop(index)
        ids = np.full(self.length, self.padding, self.dtype)
        roles = np.zeros(self.length, dtype=np.uint8)
        used = self.length - free
        ids[:used] = np.concatenate([ids for ids, _ in conversations])
        roles[:used] = np.concatenate([roles for _, roles in conversations])
        if free:
            roles[used] |= STARTS_DOCUMENT
        return PackedSample(ids, roles, len(conversations))
