"""Measure tokens per second, model FLOP/s per device and MFU between two log entries."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class IntervalRates:
    """Hold the rates of one interval; mfu is None where the peak of the device is not known."""

    seconds: float
    tokens: int
    tokens_per_second: float
    tflops_per_device: float
    mfu: float | None


class Stopwatch:
    """Measure the training steps between two log entries, without what `pause` encloses.

    It reads the host's clock and never synchronises a device. Call `lap` right after the step's
    metrics reached the host, which waits for the device anyway.

    Args:
        flops_per_token: model FLOPs per token over all devices: training of the student plus the
            forward pass of an online teacher.
        num_devices: ranks that share the work (the world size).
        peak_tflops: peak of one device, 1e12 FLOP/s, or None.
        clock: seconds, monotonic; replaceable for tests.
    """

    def __init__(
        self,
        *,
        flops_per_token: float,
        num_devices: int,
        peak_tflops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if num_devices < 1 or (peak_tflops is not None and peak_tflops <= 0):
            raise ValueError(
                f"num_devices ({num_devices}) and peak_tflops ({peak_tflops}) must be positive"
            )
        self._flops_per_token = flops_per_token
        self._num_devices = num_devices
        self._peak_tflops = peak_tflops
        self._clock = clock
        self._tokens = 0
        self._pauses = 0
        self._seconds = 0.0
        self._last_read = clock()

    def add(self, tokens: int) -> None:
        """Count tokens that all ranks together trained on since the last call, masked included."""
        self._tokens += tokens

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the enclosed time out of the interval; may be nested."""
        self._accumulate()
        self._pauses += 1
        try:
            yield
        finally:
            self._accumulate()
            self._pauses -= 1

    def lap(self) -> IntervalRates:
        """Close the interval, return its rates and begin the next one."""
        self._accumulate()
        seconds, tokens = self._seconds, self._tokens
        self._seconds, self._tokens = 0.0, 0
        rate = tokens / seconds if seconds > 0 else 0.0
        tflops = rate * self._flops_per_token / self._num_devices / 1e12
        mfu = None if self._peak_tflops is None else tflops / self._peak_tflops
        return IntervalRates(seconds, tokens, rate, tflops, mfu)

    def _accumulate(self) -> None:
        """Add the time since the last reading of the clock unless paused."""
        now = self._clock()
        if self._pauses == 0:
            self._seconds += now - self._last_read
        self._last_read = now


def measure_peak_tflops(dtype: torch.dtype, *, seconds: float = 0.2) -> float:
    """Time square matrix products on the CPU and return the best rate, 1e12 FLOP/s.

    No data sheet states a CPU's peak for a number of threads, so the reference is the best product
    that this process reaches with its present number of threads. The load of other processes
    lowers it.

    Args:
        dtype: type of the matrices.
        seconds: approximate duration.
    """
    size, best = 128, 0.0
    deadline = time.perf_counter() + seconds
    while True:
        left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
        torch.mm(left, right)
        start = time.perf_counter()
        torch.mm(left, right)
        elapsed = max(time.perf_counter() - start, 1e-9)
        best = max(best, 2 * size**3 / elapsed / 1e12)
        remaining = deadline - time.perf_counter()
        if remaining <= 0:
            return best
        # A product of twice the size takes eight times as long, and it runs twice, once to warm up.
        if 16 * elapsed < remaining and size < 8192:
            size *= 2
