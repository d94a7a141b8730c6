"""The stopwatch of training steps, and the measured peak of a CPU."""

from __future__ import annotations

import time

import pytest
import torch

from megatron_kd.telemetry.throughput import Stopwatch, measure_peak_tflops
from tests.telemetry.clock import Clock


@pytest.mark.alone
def test_measured_peak_is_plausible_and_short() -> None:
    start = time.monotonic()
    peak = measure_peak_tflops(torch.float32, seconds=0.05)
    assert time.monotonic() - start < 2
    assert 1e-4 < peak < 1e3


def test_pauses_do_not_count() -> None:
    clock = Clock()
    watch = Stopwatch(flops_per_token=2e9, num_devices=4, peak_tflops=10.0, clock=clock)
    watch.add(600)
    clock.now += 2.0
    with watch.pause():
        clock.now += 50.0
        with watch.pause():
            clock.now += 50.0
        clock.now += 50.0
    watch.add(400)
    clock.now += 3.0
    lap = watch.lap()
    assert lap.seconds == 5.0
    assert lap.tokens == 1000
    assert lap.tokens_per_second == 200.0
    assert lap.tflops_per_device == pytest.approx(200 * 2e9 / 4 / 1e12)
    assert lap.mfu == pytest.approx(0.1 / 10)
    watch.add(10)
    clock.now += 1.0
    assert watch.lap().tokens_per_second == 10.0


def test_an_error_ends_a_pause() -> None:
    clock = Clock()
    watch = Stopwatch(flops_per_token=1.0, num_devices=1, clock=clock)
    with pytest.raises(RuntimeError), watch.pause():
        clock.now += 7.0
        raise RuntimeError
    clock.now += 1.0
    lap = watch.lap()
    assert lap.seconds == 1.0
    # Without a peak there is no MFU.
    assert lap.mfu is None
    assert watch.lap().tokens_per_second == 0.0
