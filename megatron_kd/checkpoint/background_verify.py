"""Read checkpoints back while training continues, and remove those that may be removed after."""

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
    """Record the history of a run's checkpoints in checkpoints.jsonl; print warnings on stderr."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()

    def add(self, event: str, step: int, **facts: Any) -> None:
        """Append one record.

        An error is ignored: a disk that fails here is reported by the save itself.
        """
        record = {
            "event": event,
            "step": step,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **facts,
        }
        with self._lock:
            try:
                with open(self._path, "a", encoding="utf-8") as stream:
                    stream.write(json.dumps(record) + "\n")
            except OSError:
                return

    def warn(self, event: str, step: int, message: str) -> None:
        """Append a record, and print a line on stderr."""
        self.add(event, step, message=message)
        print(f"megatron_kd: warning: {message}", file=sys.stderr, flush=True)


class _ClosedError(Exception):
    """Report that the verifier was closed."""


class Verifier:
    """Read committed checkpoints back, newest first, and then remove old ones.

    It does so in a thread of low priority, on one rank only.

    Args:
        checkpoints: folder of all checkpoints.
        keep_last: how many of the newest to keep.
        log: of the run's checkpoints.

    Attributes:
        verified: steps whose digests are correct.
        damaged: step -> what is wrong with it.
    """

    def __init__(self, checkpoints: Path, *, keep_last: int, log: CheckpointLog) -> None:
        self.verified: set[int] = set()
        self.damaged: dict[int, str] = {}
        self._checkpoints, self._keep_last, self._log = checkpoints, keep_last, log
        self._waiting: list[int] = []
        self._working = False
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def add(self, step: int, *, verified: bool = False) -> None:
        """Queue the checkpoint of `step` for reading back.

        With `verified`, that was done already, and only old checkpoints are removed.
        """
        with self._changed:
            (self.verified.add if verified else self.verified.discard)(step)
            self.damaged.pop(step, None)
            self._waiting.append(step)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="verify", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    @property
    def busy(self) -> bool:
        """Return True while a checkpoint waits or is being read."""
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
            except Exception as error:  # The checkpoint counts as unverified.
                self._log.warn(
                    "unverified",
                    step,
                    f"the checkpoint of step {step} could not be read back "
                    f"({type(error).__name__}: {error})",
                )
            with self._changed:
                self._working = False

    def close(self, seconds: float = 10.0) -> None:
        """Stop reading; wait at most `seconds` for a removal that is in progress."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(seconds)

    def _check_closed(self, _bytes: int) -> None:
        if self._closed:
            raise _ClosedError

    def _verify(self, step: int) -> None:
        if step not in self.verified and not self._is_intact(step):
            return
        for removed in prune(self._checkpoints, self._keep_last, self.verified):
            self.verified.discard(removed)
            self._log.add("removed", removed)

    def _is_intact(self, step: int) -> bool:
        begin = time.perf_counter()
        problems = verify(
            step_folder(self._checkpoints, step), from_disk=True, progress=self._check_closed
        )
        if problems:
            self.damaged[step] = summarize_problems(problems)
            message = (
                f"the checkpoint of step {step} was written and does not read back: "
                f"{self.damaged[step]}; older ones are kept"
            )
            self._log.warn("damaged", step, message)
            return False
        self.verified.add(step)
        self._log.add("verified", step, seconds=round(time.perf_counter() - begin, 3))
        return True
