"""Progress as lines of a log file and as a bar on a terminal."""

from __future__ import annotations

import io
import math

import pytest

from megatron_kd.telemetry.progress_bar import ProgressBar
from tests.telemetry.clock import Clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_first_last_and_every_interval() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = ProgressBar("auto", steps=200, enabled=True, stream=stream, clock=clock)
    for step in range(1, 201):
        clock.now += 0.5
        progress.update(step, loss=5.123, kd=2.2, tokens_per_second=12345.0)
    lines = stream.getvalue().splitlines()
    progress.close()
    assert stream.getvalue().splitlines() == lines
    assert lines[0] == "step 1/200  loss 5.123  kd 2.200  12.3k tokens/s  ETA --:--:--"
    assert lines[2] == "step 41/200  loss 5.123  kd 2.200  12.3k tokens/s  ETA 00:01:20"
    assert lines[-1] == "step 200/200  loss 5.123  kd 2.200  12.3k tokens/s  ETA 00:00:00"
    assert [line.split("/")[0] for line in lines] == [
        f"step {step}" for step in (*range(1, 200, 20), 200)
    ]


def test_lines_of_a_resumed_run_that_stops_early() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = ProgressBar(
        "lines", steps=10_000, start_step=500, enabled=True, stream=stream, clock=clock
    )
    for step in range(501, 504):
        # The first step compiles, which must not lengthen the remaining time.
        clock.now += 1000.0 if step == 501 else 4.0
        progress.update(step, loss=math.nan, tokens_per_second=950.0)
    progress.message("stopped by a signal")
    progress.close()
    progress.close()
    assert stream.getvalue().splitlines() == [
        "step 501/10000  loss nan  950 tokens/s  ETA --:--:--",
        "stopped by a signal",
        "step 503/10000  loss nan  950 tokens/s  ETA 10:33:08",
    ]


def test_bar_on_a_terminal() -> None:
    stream = Terminal()
    progress = ProgressBar("auto", steps=4, enabled=True, stream=stream, clock=Clock())
    for step in range(1, 5):
        progress.update(step, loss=1.5, tokens_per_second=2_500_000.0)
    progress.close()
    assert "\r" in stream.getvalue()
    assert "step 4/4  loss 1.500  2.50M tokens/s" in stream.getvalue()


@pytest.mark.parametrize(
    ("mode", "enabled"), [("auto", False), ("bar", False), ("lines", False), ("off", True)]
)
def test_nothing_is_printed(mode: str, enabled: bool, capfd: pytest.CaptureFixture[str]) -> None:
    stream = Terminal()
    progress = ProgressBar(mode, steps=2, enabled=enabled, stream=stream, clock=Clock())
    progress.update(2, loss=1.0)
    progress.message("hello")
    progress.close()
    assert stream.getvalue() == ""
    assert tuple(capfd.readouterr()) == ("", "")
