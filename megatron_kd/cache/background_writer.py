"""Encode and write the targets of training steps in a thread, so that the step need not wait."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_kd.cache.staged import StagedWriter
from megatron_kd.targets.sparse import SparseTarget

CLOSE_SECONDS = 60.0


class _Item(NamedTuple):
    """Hold the samples of one step in CPU memory.

    Attributes:
        step: the training step.
        tokens: int [B, S].
        target: [S, B, K].
        wait: returns once the samples have arrived in memory.
    """

    step: int
    tokens: Tensor
    target: SparseTarget
    wait: Callable[[], None]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.tokens, *self.target.tensors()))


class BackgroundWriter:
    """Pass samples to a StagedWriter in another thread, in order.

    After a failure it accepts samples and writes nothing. Samples of one call always fit into an
    empty queue.

    Args:
        writer: writes the samples.
        max_bytes: limit of the samples that wait or are being written. `put` waits until there is
            room, so that memory does not grow where the disk is slower than the training.
    """

    def __init__(self, writer: StagedWriter, *, max_bytes: int) -> None:
        self._writer, self._max_bytes = writer, max_bytes
        self._items: deque[_Item] = deque()
        self._changed = threading.Condition()
        self._bytes = 0
        self._closed = False
        self._error: Exception | None = None
        # A daemon: a process that stops with an error must not hang on a full disk.
        self._thread = threading.Thread(target=self._work, name="capture", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Return True if something could not be written."""
        return self._error is not None

    @property
    def problem(self) -> str | None:
        """Return the error message of the first failure, or None."""
        error = self._error
        return (
            None if error is None else f"{self._writer.directory}: {type(error).__name__}: {error}"
        )

    def put(self, step: int, tokens: Tensor, target: SparseTarget) -> None:
        """Queue the samples of one step.

        Args:
            step: the training step.
            tokens: int [B, S], on any device.
            target: [S, B, K], on any device. Neither may be written to afterwards.
        """
        item = _to_cpu(step, tokens, target)
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self.failed or not self._bytes or self._bytes + item.bytes <= self._max_bytes
                )
            )
            if not self.failed:
                self._items.append(item)
                self._bytes += item.bytes
                self._changed.notify_all()

    def stage(self) -> None:
        """Wait until everything is written, then make it durable; see `StagedWriter.stage`.

        A failure is reported by `problem`.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.failed or not self._bytes)
        self._attempt(self._writer.stage)

    def publish(self) -> None:
        """Make the staged shards visible. A failure is reported by `problem`."""
        self._attempt(self._writer.publish)

    def _attempt(self, action: Callable[[], None]) -> None:
        """Run `action` and record its error: the thread has no caller to raise to."""
        if not self.failed:
            try:
                action()
            except Exception as error:
                self._error = error

    def close(self) -> None:
        """Stop the thread after its current item; drop queued and unstaged samples."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(CLOSE_SECONDS)
        # If the disk hangs, the writer stays with the thread, which ends with the process.
        if not self._thread.is_alive():
            self._writer.close()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._closed)
                if self._closed:
                    return
                item = self._items.popleft()
            self._attempt(partial(self._write, item))
            with self._changed:
                self._bytes -= item.bytes
                if self.failed:
                    self._items.clear()
                    self._bytes = 0
                self._changed.notify_all()

    def _write(self, item: _Item) -> None:
        item.wait()
        for number, tokens in enumerate(item.tokens):
            sample = item.target.map(itemgetter((slice(None), number)))
            self._writer.add(item.step, tokens, sample)


def _to_cpu(step: int, tokens: Tensor, target: SparseTarget) -> _Item:
    """Return the samples on the CPU; copies from a GPU do not block the training thread."""
    if not target.indices.is_cuda:
        return _Item(step, tokens, target, lambda: None)

    def pinned(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
            tensor, non_blocking=True
        )

    samples = pinned(tokens), target.map(pinned)
    arrived = torch.cuda.Event()
    arrived.record()
    return _Item(step, *samples, arrived.synchronize)
