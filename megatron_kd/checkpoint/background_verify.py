"""Reading a checkpoint back while training goes on, and what rotation may remove after it."""

from __future__ import annotations

import json
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_kd.checkpoint.background_job import lower_priority
from megatron_kd.checkpoint.manifest import summarize_problems, verify
from megatron_kd.checkpoint.store import prune, step_folder


class CheckpointLog:
    """What happens to a run's checkpoints: rows of `checkpoints.jsonl` in the run directory, and what is urgent on stderr too."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()

    def add(self, event: str, step: int, **facts: Any) -> None:
        """One row. A disk that does not take it has more important things to say than this."""
        row = {
            "event": event,
            "step": step,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **facts,
        }
        with self._lock:
            try:
                with open(self._path, "a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row) + "\n")
            except OSError:
                return

    def warn(self, event: str, step: int, message: str) -> None:
        """A row, and a line on stderr."""
        self.add(event, step, message=message)
        print(f"megatron_kd: warning: {message}", file=sys.stderr, flush=True)


class _ClosedError(Exception):
    """Nobody waits for the answer any more."""


class Verifier:
    """Reads committed checkpoints back, newest first, in a thread of low priority; then removes old ones. On one rank only.

    good: steps whose digests were found right. bad: step -> what is wrong with it.
    """

    def __init__(self, checkpoints: Path, *, keep_last: int, log: CheckpointLog) -> None:
        self.good: set[int] = set()
        self.bad: dict[int, str] = {}
        self._checkpoints, self._keep_last, self._log = checkpoints, keep_last, log
        self._waiting: list[int] = []
        self._working = False
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def add(self, step: int, *, good: bool = False) -> None:
        """Read the checkpoint of `step` back as soon as may be. good: that was done elsewhere, and only rotation is left to do."""
        with self._changed:
            (self.good.add if good else self.good.discard)(step)
            self.bad.pop(step, None)
            self._waiting.append(step)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="verify", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    @property
    def busy(self) -> bool:
        """Whether something is still to be read."""
        with self._changed:
            return self._working or bool(self._waiting)

    def _work(self) -> None:
        lower_priority()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                step = self._waiting.pop()
                self._working = True
            try:
                self._verify(step)
            except _ClosedError:
                pass
            except Exception as error:  # whatever it is, the checkpoint counts as unverified
                self._log.warn(
                    "unverified",
                    step,
                    f"the checkpoint of step {step} could not be read back ({type(error).__name__}: {error})",
                )
            with self._changed:
                self._working = False

    def close(self, seconds: float = 10.0) -> None:
        """Read no further; wait so long for what is being removed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(seconds)

    def _look_up(self, _bytes: int) -> None:
        if self._closed:
            raise _ClosedError

    def _verify(self, step: int) -> None:
        if step not in self.good and not self._sound(step):
            return
        for removed in prune(self._checkpoints, self._keep_last, self.good):
            self.good.discard(removed)
            self._log.add("removed", removed)

    def _sound(self, step: int) -> bool:
        begin = time.perf_counter()
        problems = verify(
            step_folder(self._checkpoints, step), from_disk=True, progress=self._look_up
        )
        if problems:
            self.bad[step] = summarize_problems(problems)
            message = f"the checkpoint of step {step} was written and does not read back: {self.bad[step]}; older ones are kept"
            self._log.warn("damaged", step, message)
            return False
        self.good.add(step)
        self._log.add("verified", step, seconds=round(time.perf_counter() - begin, 3))
        return True
