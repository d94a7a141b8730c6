"""Run a job on files in a thread, with a phase to report and a deadline."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

RUNNING, DONE, FAILED = 1, 0, 2


class BackgroundJob:
    """Run `work(report_phase)` in a thread; `report_phase(phase)` names the current phase.

    The thread is a daemon: a process must not hang at exit on a disk that does.

    Args:
        work: the job; its return value becomes `result`.
        limit_seconds: after this time the job has failed, whatever it returns later.
        low_priority: let the training run first.
    """

    def __init__(
        self,
        work: Callable[[Callable[[str], None]], Any],
        *,
        limit_seconds: float,
        low_priority: bool = False,
    ) -> None:
        self.phase = "starting"
        self.result: Any = None
        self.error: BaseException | None = None
        self._work, self._limit, self._low = work, limit_seconds, low_priority
        self._since = time.monotonic()
        self._done = threading.Event()
        self._late = False
        threading.Thread(target=self._run, name="checkpoint", daemon=True).start()

    def _run(self) -> None:
        if self._low:
            lower_priority()
        try:
            self.result = self._work(self._report_phase)
        except BaseException as error:  # Reported by `problem`.
            self.error = error
        self._done.set()

    def _report_phase(self, phase: str) -> None:
        self.phase = phase

    @property
    def seconds(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self._since

    @property
    def state(self) -> int:
        """Return RUNNING, DONE or FAILED.

        A job that once was too late stays FAILED, because other ranks have been informed.
        """
        if self._late:
            return FAILED
        if self._done.is_set():
            return FAILED if self.error is not None else DONE
        self._late = self.seconds > self._limit
        return FAILED if self._late else RUNNING

    @property
    def problem(self) -> str | None:
        """Return the error message where the job has failed, else None."""
        if self.state != FAILED:
            return None
        if self.error is None:
            return (
                f"{self.phase} has taken {self.seconds:.1f} s, "
                f"more than checkpoint.timeout_seconds = {self._limit:g}"
            )
        error = self.error
        if isinstance(error, OSError):
            path = f"{error.filename}: " if error.filename else ""
            return f"{path}{error.strerror or error} (while {self.phase})"
        return f"{type(error).__name__}: {error} (while {self.phase})"


def lower_priority() -> None:
    """Let the calling thread run only when no other thread needs the processor.

    Linux has priorities for threads; on other systems this does nothing.
    """
    if os.uname().sysname == "Linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)
