"""A thread that encodes and writes what a training step hands over, so that the step need not wait for it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_kd.cache.staged import StagedWriter
from megatron_kd.targets.sparse import SparseTarget

CLOSE_SECONDS = 60.0


class _Item(NamedTuple):
    """Samples of one step in memory of the CPU; wait: returns once they have arrived there."""

    step: int
    tokens: Tensor
    target: SparseTarget
    wait: Callable[[], None]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.tokens, *self.target.tensors()))


class BackgroundWriter:
    """Hands samples to a StagedWriter in another thread, in order. After a failure it takes everything and writes nothing.

    max_bytes: of samples that wait or are being written; `put` waits until there is room, so that memory does not grow where
    the disk is slower than the training. One call's samples always fit into an empty queue.
    """

    def __init__(self, writer: StagedWriter, *, max_bytes: int) -> None:
        self._writer, self._max_bytes = writer, max_bytes
        self._items: deque[_Item] = deque()
        self._changed = threading.Condition()
        self._bytes = 0
        self._closed = False
        self._error: Exception | None = None
        # Not waited for at exit: a process that stops with an error must not hang on a full disk.
        self._thread = threading.Thread(target=self._work, name="capture", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether something could not be written."""
        return self._error is not None

    @property
    def problem(self) -> str | None:
        """What went wrong, if anything did."""
        error = self._error
        return (
            None if error is None else f"{self._writer.directory}: {type(error).__name__}: {error}"
        )

    def put(self, step: int, tokens: Tensor, target: SparseTarget) -> None:
        """Hand over samples: tokens int [B, S], target [S, B, K], on any device; neither may be written to afterwards."""
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
        """Wait until all is written, then make it durable: see StagedWriter. A failure shows in `problem`."""
        with self._changed:
            self._changed.wait_for(lambda: self.failed or not self._bytes)
        self._attempt(self._writer.stage)

    def publish(self) -> None:
        """Show what was staged. A failure shows in `problem`."""
        self._attempt(self._writer.publish)

    def _attempt(self, action: Callable[[], None]) -> None:
        if not self.failed:
            try:
                action()
            except Exception as error:
                self._error = error

    def close(self) -> None:
        """End the thread after what it is writing; drop what waits and what was not staged."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(CLOSE_SECONDS)
        if (
            not self._thread.is_alive()
        ):  # else the disk hangs: leave it to the thread, which ends with the process
            self._writer.close()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._closed)
                if self._closed:
                    return
                item = self._items.popleft()
            # Whatever it is, the run has to hear of it: this thread has nobody to raise to.
            self._attempt(lambda item=item: self._write(item))  # type: ignore[misc]
            with self._changed:
                self._bytes -= item.bytes
                if self.failed:
                    self._items.clear()
                    self._bytes = 0
                self._changed.notify_all()

    def _write(self, item: _Item) -> None:
        item.wait()
        for number, tokens in enumerate(item.tokens):
            sample = item.target.map(lambda t, number=number: t[:, number])  # type: ignore[misc]
            self._writer.add(item.step, tokens, sample)


def _to_cpu(step: int, tokens: Tensor, target: SparseTarget) -> _Item:
    """The samples on the CPU; from a GPU they go on their way without the training thread waiting for them."""
    if not target.indices.is_cuda:
        return _Item(step, tokens, target, lambda: None)

    def pinned(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
            tensor, non_blocking=True
        )

    item = pinned(tokens), target.map(pinned)
    arrived = torch.cuda.Event()
    arrived.record()
    return _Item(step, *item, arrived.synchronize)
