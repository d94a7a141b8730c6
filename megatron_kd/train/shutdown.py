"""Leaving in good order: what asks a run to save and go, and how all ranks come to go after the same step.

A batch system takes its nodes back: by a signal some minutes before, by a limit known at the start, or a person wants the run to end.
Exit codes tell the script that started it what to do next; status.json says the same, for launchers that swallow codes.
"""

from __future__ import annotations

import signal
import time
from enum import IntEnum
from pathlib import Path
from types import FrameType

import torch

from megatron_kd.parallel.collectives import maximum

FINISHED, REQUEUE, NEVER_AGAIN = 0, 85, 93
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


class Request(IntEnum):
    """What a run is asked for; of several ranks' the greatest counts."""

    GO_ON = 0
    REQUEUE = 1
    STOP = 2


class Leaving:
    """What this rank was asked for since it was made. Signals are caught from then on, in the main thread.

    SIGUSR1, SIGUSR2, SIGTERM, and `minutes` of running mean: save, leave, start again (exit code 85). A file named `stop` in the run's
    directory means: save, leave, and do not (93); it is removed when it has been heeded.
    """

    def __init__(self, directory: Path, *, minutes: float | None, watches_file: bool) -> None:
        self._file = directory / "stop" if watches_file else None
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.reason = ""
        self._signal = ""
        for number in SIGNALS:
            signal.signal(number, self._take)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    def asked(self) -> Request:
        """What this rank knows of; `reason` says why."""
        if self._file is not None and self._file.exists():
            self.reason = f"the file {self._file} asked for it"
            return Request.STOP
        if self._signal:
            self.reason = f"{self._signal} asked for it"
            return Request.REQUEUE
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self.reason = "train.minutes are over"
            return Request.REQUEUE
        return Request.GO_ON

    def agreed(self, device: torch.device) -> Request:
        """What any rank was asked for: the same on all. One all-reduce of a number over the world."""
        own = self.asked()
        found = Request(int(maximum(float(own), device)))
        if found != own:
            self.reason = "another rank was asked to"
        return found

    def heeded(self) -> None:
        """The run is saved and leaves."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)


class NeverLeaving(Leaving):
    """Nobody asks: for runs that are driven step by step."""

    def __init__(self) -> None:
        self.reason = ""

    def agreed(self, device: torch.device) -> Request:
        """Go on. No collective."""
        return Request.GO_ON

    def heeded(self) -> None:
        """Nothing to clear away."""
