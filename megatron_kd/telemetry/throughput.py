"""Tokens per second, model FLOP/s per device and MFU over the interval since the last row."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Lap:
    """Rates of one interval. mfu is None where the peak of the device is not known."""

    seconds: float
    tokens: int
    tokens_per_second: float
    tflops_per_device: float
    mfu: float | None


class Stopwatch:
    """Measures the training steps between two rows; evaluation and saving are cut out with `pause`.

    It reads the host's clock and never synchronises a device: call `lap` right after the step's metrics reached the
    host, which waits for the device anyway.

    Args:
        flops_per_token: model FLOPs per token over all devices: training of the student plus the forward pass of
            an online teacher.
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
        self._since = clock()

    def add(self, tokens: int) -> None:
        """Count tokens that all ranks together have trained on since the last call, masked ones included."""
        self._tokens += tokens

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time inside out of the interval; may be nested."""
        self._settle()
        self._pauses += 1
        try:
            yield
        finally:
            self._settle()
            self._pauses -= 1

    def lap(self) -> Lap:
        """Close the interval, return its rates and begin the next one."""
        self._settle()
        seconds, tokens = self._seconds, self._tokens
        self._seconds, self._tokens = 0.0, 0
        rate = tokens / seconds if seconds > 0 else 0.0
        tflops = rate * self._flops_per_token / self._num_devices / 1e12
        mfu = None if self._peak_tflops is None else tflops / self._peak_tflops
        return Lap(seconds, tokens, rate, tflops, mfu)

    def _settle(self) -> None:
        now = self._clock()
        if self._pauses == 0:
            self._seconds += now - self._since
        self._since = now
