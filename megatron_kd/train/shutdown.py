"""ShutdownRequest in good order: what asks a run to save and go, and how all ranks come to go after the same step.

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

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


class Action(IntEnum):
    """What a run is asked for; of several ranks' the greatest counts."""

    CONTINUE = 0
    REQUEUE = 1
    STOP = 2


class ShutdownRequest:
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

    def poll(self) -> Action:
        """What this rank knows of; `reason` says why."""
        if self._file is not None and self._file.exists():
            self.reason = f"the file {self._file} asked for it"
            return Action.STOP
        if self._signal:
            self.reason = f"{self._signal} asked for it"
            return Action.REQUEUE
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self.reason = "train.minutes are over"
            return Action.REQUEUE
        return Action.CONTINUE

    def agree(self, device: torch.device) -> Action:
        """What any rank was asked for: the same on all. One all-reduce of a number over the world."""
        own = self.poll()
        found = Action(int(maximum(float(own), device)))
        if found != own:
            self.reason = "another rank was asked to"
        return found

    def acknowledge(self) -> None:
        """The run is saved and leaves."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)


class NoShutdown(ShutdownRequest):
    """Nobody asks: for runs that are driven step by step."""

    def __init__(self) -> None:
        self.reason = ""

    def agree(self, device: torch.device) -> Action:
        """Go on. No collective."""
        return Action.CONTINUE

    def acknowledge(self) -> None:
        """Nothing to clear away."""
