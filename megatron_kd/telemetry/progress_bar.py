"""Progress for whoever watches: a bar on a terminal, sparse lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Literal, TextIO

from tqdm import tqdm

Mode = Literal["auto", "bar", "lines", "off"]


class Progress:
    """Shows step, loss, rate and time left. Prints nothing with enabled=False or mode "off".

    Args:
        mode: auto: a bar where `stream` is a terminal, else lines. lines: the first step, then one line at most
            every `interval` seconds, and the last step.
        steps: optimizer updates in the whole run.
        start_step: updates already done when this process began (a resumed run).
        enabled: True on rank 0 only.
        stream: defaults to sys.stderr.
        interval: seconds between lines.
        clock: seconds, monotonic; replaceable for tests.
    """

    def __init__(
        self,
        mode: Mode,
        *,
        steps: int,
        start_step: int = 0,
        enabled: bool,
        stream: TextIO | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        if mode == "auto":
            mode = "bar" if self._stream.isatty() else "lines"
        self._mode: Mode = mode if enabled else "off"
        self._steps = steps
        self._interval = interval
        self._clock = clock
        self._step = start_step
        self._anchor: tuple[int, float] | None = None
        self._rate: float | None = None
        self._losses = ""
        self._printed_step: int | None = None
        self._printed_at = 0.0
        self._bar = None
        if self._mode == "bar":
            self._bar = tqdm(
                total=steps,
                initial=start_step,
                file=self._stream,
                bar_format="{bar:24}| {desc}",
                dynamic_ncols=True,
            )

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        kd: float | None = None,
        tokens_per_second: float | None = None,
    ) -> None:
        """Show that `step` updates are done. loss and kd: nats per token; without a loss, or a rate, the last one stays."""
        if self._mode == "off":
            return
        now = self._clock()
        first = self._anchor is None
        if first:
            # The first step also pays for allocation and compilation: the time left is judged from the later ones.
            self._anchor = (step, now)
        if loss is not None:
            self._losses = f"  loss {loss:.3f}" + ("" if kd is None else f"  kd {kd:.3f}")
        if tokens_per_second is not None:
            self._rate = tokens_per_second
        self._step = step
        if self._bar is not None:
            self._bar.set_description_str(self._line(now), refresh=False)
            self._bar.update(step - self._bar.n)
            self._printed_step = step
        elif first or step >= self._steps or now - self._printed_at >= self._interval:
            self._print_line(now)

    def message(self, text: str) -> None:
        """Print a line of text without tearing the bar."""
        if self._mode != "off":
            tqdm.write(text, file=self._stream)
            self._stream.flush()

    def close(self) -> None:
        """Finish the bar, or print the last line where it is still due (a run that stopped early)."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            self._mode = "off"
        elif self._mode == "lines":
            if self._printed_step is not None and self._printed_step != self._step:
                self._print_line(self._clock())
            self._mode = "off"

    def _print_line(self, now: float) -> None:
        print(self._line(now), file=self._stream, flush=True)
        self._printed_step, self._printed_at = self._step, now

    def _line(self, now: float) -> str:
        rate = "" if self._rate is None else f"  {short_count(self._rate)} tokens/s"
        return f"step {self._step}/{self._steps}{self._losses}{rate}  ETA {self._eta(now)}"

    def _eta(self, now: float) -> str:
        """Time left at the pace so far, evaluation and saving included."""
        step, since = self._anchor or (self._step, now)
        if self._step <= step:
            return "--:--:--"
        left = round((now - since) / (self._step - step) * max(self._steps - self._step, 0))
        return f"{left // 3600:02d}:{left // 60 % 60:02d}:{left % 60:02d}"


def short_count(value: float) -> str:
    """A count in three digits or so: 950, 12.3k, 1.23M."""
    if value < 1e3:
        return f"{value:.0f}"
    if value < 1e6:
        return f"{value / 1e3:.1f}k"
    return f"{value / 1e6:.2f}M"
