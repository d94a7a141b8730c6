"""One thing to be done with files while the process does something else, and what there is to report_phase about it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

RUNNING, DONE, FAILED = 1, 0, 2


class BackgroundJob:
    """`work(report_phase)` in a thread; `report_phase(phase)` tells where it is. Not waited for at exit: a process must not hang on a disk that does.

    limit_seconds: after these it has failed, whatever becomes of it. low_priority: give way to the training.
    """

    def __init__(
        self,
        work: Callable[[Callable[[str], None]], Any],
        *,
        limit_seconds: float,
        low_priority: bool = False,
    ) -> None:
        self.phase, self.result, self.error = "starting", None, None  # type: tuple[str, Any, BaseException | None]
        self._work, self._limit, self._low = work, limit_seconds, low_priority
        self._since = time.monotonic()
        self._done = threading.Event()
        self._late = False
        threading.Thread(target=self._run, name="checkpoint", daemon=True).start()

    def _run(self) -> None:
        if self._low:
            lower_priority()
        try:
            self.result = self._work(self._say)
        except BaseException as error:  # the thread has nobody to raise to: `problem` says it
            self.error = error
        self._done.set()

    def _say(self, phase: str) -> None:
        self.phase = phase

    @property
    def seconds(self) -> float:
        """Since its beginning."""
        return time.monotonic() - self._since

    @property
    def state(self) -> int:
        """RUNNING, DONE or FAILED. What was once too late stays so: other ranks have heard of it."""
        if self._late:
            return FAILED
        if self._done.is_set():
            return FAILED if self.error is not None else DONE
        self._late = self.seconds > self._limit
        return FAILED if self._late else RUNNING

    @property
    def problem(self) -> str | None:
        """What went wrong, where something did."""
        if self.state != FAILED:
            return None
        if self.error is None:
            return f"{self.phase} has taken {self.seconds:.1f} s, more than checkpoint.timeout_seconds = {self._limit:g}"
        error = self.error
        if isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else ""
            return f"{where}{error.strerror or error} (while {self.phase})"
        return f"{type(error).__name__}: {error} (while {self.phase})"


def lower_priority() -> None:
    """Let the thread that calls this run when nothing else wants to; Linux gives threads priorities of their own, others do nothing."""
    if os.uname().sysname == "Linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)
