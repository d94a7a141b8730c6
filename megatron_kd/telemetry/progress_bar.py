"""Show the progress of a run: a bar on a terminal, sparse lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Literal, TextIO

from tqdm import tqdm

Mode = Literal["auto", "bar", "lines", "off"]


class ProgressBar:
    """Show step, loss, rate and remaining time.

    It prints nothing with enabled=False or mode "off".

    Args:
        mode: auto: a bar where `stream` is a terminal, else lines. lines: the first step, then one
            line at most every `interval` seconds, and the last step.
        steps: optimizer updates in the whole run.
        start_step: updates already done when this process began (a resumed run).
        enabled: True on rank 0 only.
        stream: defaults to sys.stderr.
        interval: seconds between lines.
        clock: seconds, monotonic; replaceable for tests.
    """

    def __init__(  # noqa: PLR0913 - keyword-only settings, all but two of them optional
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
        self._first_update: tuple[int, float] | None = None
        self._rate: float | None = None
        self._losses = ""
        self._printed_step: int | None = None
        self._printed_time = 0.0
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
        """Show that `step` updates are done.

        Args:
            step: number of updates, counted from the start of the run.
            loss: cross-entropy, nats per token. None: keep the last one.
            kd: distillation loss, nats per token. None: show only `loss`.
            tokens_per_second: rate over all ranks. None: keep the last one.
        """
        if self._mode == "off":
            return
        now = self._clock()
        is_first = self._first_update is None
        if is_first:
            # The first step also pays for allocation and compilation, so the remaining time is
            # estimated from the later ones.
            self._first_update = (step, now)
        if loss is not None:
            self._losses = f"  loss {loss:.3f}" + ("" if kd is None else f"  kd {kd:.3f}")
        if tokens_per_second is not None:
            self._rate = tokens_per_second
        self._step = step
        if self._bar is not None:
            self._bar.set_description_str(self._line(now), refresh=False)
            self._bar.update(step - self._bar.n)
            self._printed_step = step
        elif is_first or step >= self._steps or now - self._printed_time >= self._interval:
            self._print_line(now)

    def message(self, text: str) -> None:
        """Print a line of text without breaking the bar."""
        if self._mode != "off":
            tqdm.write(text, file=self._stream)
            self._stream.flush()

    def close(self) -> None:
        """Finish the bar, or print the last line if it is still due (a run that stopped early)."""
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
        self._printed_step, self._printed_time = self._step, now

    def _line(self, now: float) -> str:
        rate = "" if self._rate is None else f"  {short_count(self._rate)} tokens/s"
        eta = self._remaining_time(now)
        return f"step {self._step}/{self._steps}{self._losses}{rate}  ETA {eta}"

    def _remaining_time(self, now: float) -> str:
        """Return the remaining time at the average pace, evaluation and saving included."""
        first_step, start = self._first_update or (self._step, now)
        if self._step <= first_step:
            return "--:--:--"
        pace = (now - start) / (self._step - first_step)
        seconds = round(pace * max(self._steps - self._step, 0))
        return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def short_count(value: float) -> str:
    """Return a count in about three digits: 950, 12.3k, 1.23M."""
    if value < 1e3:
        return f"{value:.0f}"
    if value < 1e6:
        return f"{value / 1e3:.1f}k"
    return f"{value / 1e6:.2f}M"
