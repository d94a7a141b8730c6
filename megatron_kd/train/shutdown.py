"""Coordinate a graceful shutdown on signals, a time limit or a stop file.

A batch system takes its nodes back, announced by a signal some minutes before or by a limit known
at the start, or a person wants the run to end. All ranks save and stop after the same step. The
exit code tells the script that started the run what to do next (storage/exit_codes.py).
`status.json` says the same, for launchers that drop exit codes.
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
    """Say what a run has to do next. If ranks disagree, the greatest value counts."""

    CONTINUE = 0
    REQUEUE = 1
    STOP = 2


class ShutdownRequest:
    """Collect the shutdown requests that reach this rank from construction on.

    SIGUSR1, SIGUSR2, SIGTERM and the end of `minutes` mean: save, stop, start again (exit code 85).
    A file named `stop` in the run's directory means: save, stop, do not start again (exit code 93).
    Construct it in the main thread, which receives the signals.

    Args:
        directory: The run's directory.
        minutes: Time limit from now on; None for no limit.
        watches_file: True on the one rank that looks for the file `stop`.
    """

    def __init__(self, directory: Path, *, minutes: float | None, watches_file: bool) -> None:
        self._file = directory / "stop" if watches_file else None
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.reason = ""
        self._signal = ""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    def poll(self) -> Action:
        """Return the request that reached this rank, and set `reason`."""
        if self._file is not None and self._file.exists():
            self.reason = f"the file {self._file} requested it"
            return Action.STOP
        if self._signal:
            self.reason = f"{self._signal} requested it"
            return Action.REQUEUE
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self.reason = "train.minutes are over"
            return Action.REQUEUE
        return Action.CONTINUE

    def agree(self, device: torch.device) -> Action:
        """Return the greatest request of all ranks, and set `reason`.

        Collectives:
            One all-reduce of a number over the world.
        """
        local = self.poll()
        action = Action(int(maximum(float(local), device)))
        if action != local:
            self.reason = "another rank received a request"
        return action

    def acknowledge(self) -> None:
        """Remove the stop file, after the run was saved."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)


class NoShutdown(ShutdownRequest):
    """Never request a shutdown, for runs that are driven step by step."""

    def __init__(self) -> None:
        self.reason = ""

    def poll(self) -> Action:
        """Return CONTINUE: nothing can request a shutdown."""
        return Action.CONTINUE

    def agree(self, device: torch.device) -> Action:
        """Return CONTINUE, without a collective."""
        return self.poll()

    def acknowledge(self) -> None:
        """Do nothing."""
