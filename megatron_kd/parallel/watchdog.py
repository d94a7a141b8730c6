"""Whose fault it is when ranks wait: each tells the others where it stands, and the one that waits too long says who is missing.

A rank that never enters a collective stops all others with a message about sockets, or with none. What a rank does last is kept in the
rendezvous store instead, a few bytes a second from a thread of its own, and read by others when something goes wrong and never before.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch.distributed as dist

_SHOWN = 8  # ranks that one sentence names
_MAX_READERS = 32  # ranks that read what all others said; the rest read the verdict: a store serves thousands one after the other


class LostRankError(RuntimeError):
    """Another rank died, stopped or stays behind; the message names it and what it was doing."""


class Watchdog:
    """Where this rank stands, for the others to read; and a look at them where one of them is missing.

    Every rank says `at` the same things in the same order. Used as a context: inside it a thread publishes, and ends the process
    (exit code 1) when this rank has stood at one place for nearly `limit_seconds` because another one is silent or behind. An error
    of communication leaves the context as LostRankError where a rank is missing; any other error is told to the rest.

    Args:
        store: what the ranks met in; None (one rank) watches nothing.
        limit_seconds: longest wait, as for a collective.
        interval_seconds: between two signs of life. None: one second for each thousand ranks.
    """

    def __init__(
        self,
        store: Any,
        *,
        rank: int,
        world_size: int,
        limit_seconds: float,
        interval_seconds: float | None = None,
    ) -> None:
        self.rank, self.world_size, self.limit_seconds = rank, world_size, limit_seconds
        self.interval_seconds = interval_seconds or max(1.0, world_size / 1000)
        # Clients of their own: a store answers one question at a time, and the run asks it too.
        self._store = None
        if store is not None and world_size > 1:
            self._store = dist.PrefixStore("watch", store.clone())  # type: ignore[attr-defined]
        self.step = 0
        self.on_lost: Callable[[str], None] = lambda _sentence: None
        self._place: tuple[int, str, float] = (0, "starting", time.monotonic())
        self._failure = ""
        self._verdict: str | None = None
        self._beat = 0
        self._limited = False
        self._patience = limit_seconds
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def enter_phase(
        self, what: str, *, limited: bool = True, limit_seconds: float | None = None
    ) -> None:
        """This rank begins `what`. limited: False where it may take as long as it likes. limit_seconds: where it may take longer than a
        collective (a checkpoint).
        """
        self._limited = limited
        self._patience = max(limit_seconds or 0.0, self.limit_seconds)
        self._place = (self._place[0] + 1, what, time.monotonic())

    def __enter__(self) -> Watchdog:
        if self._store is not None and self._thread is None:
            self._publish()
            self._stop.clear()
            self._thread = threading.Thread(target=self._keep_watch, name="watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._store is None:
            return
        self._limited = False
        sentence = self.missing() if error is not None and _is_communication(error) else None
        if error is not None and not _is_communication(error):
            self._failure = f"{type(error).__name__}: {str(error)[:300]}"
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10 * self.interval_seconds)
            self._thread = None
        if sentence is not None:
            self._linger()
            raise LostRankError(sentence) from error

    def missing(self) -> str | None:
        """One sentence about the ranks that failed, do not answer or are behind this one; None where all are with it.

        Takes about three intervals: a rank is silent that gives no sign of life in them.
        """
        try:
            told = self._verdict or (
                self._wait_for_verdict() if self.rank >= _MAX_READERS else None
            )
            if told is not None:
                return told
            before = self._read()
            time.sleep(3 * self.interval_seconds)
            found = self._judge(before, self._read())
            if found is not None and self._store is not None:
                self._store.set("verdict", found)
        except RuntimeError:
            return (
                self._verdict
                or "the rendezvous store does not answer: the process that holds it (rank 0's, or its launcher) is gone"
            )
        return found

    def _wait_for_verdict(self) -> str | None:
        assert self._store is not None
        for _ in range(8):
            if self._store.check(["verdict"]):
                return str(self._store.get("verdict").decode())
            time.sleep(self.interval_seconds)
        return None

    def _judge(self, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str | None:
        count, what, _ = self._place
        newest = max(count, *(each["count"] for each in after))
        failed, silent, behind = [], [], []
        for rank, (old, new) in enumerate(zip(before, after, strict=True)):
            who = f"rank {rank} (process {new['process']} on {new['host']})"
            where = f"step {new['step']}, {new['what']}"
            if new["failure"]:
                failed.append(f"{who} failed at {where}: {new['failure']}")
            elif rank != self.rank and old["beat"] == new["beat"]:
                silent.append(f"{who} gives no sign of life since {where}")
            elif (count if rank == self.rank else new["count"]) < newest:
                behind.append(f"{who} is still at {where}, for {new['seconds']:.0f} s")
        for found in (failed, silent, behind):
            if found:
                more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
                return f"{'; '.join(found[:_SHOWN])}{more} (rank {self.rank} waits at step {self.step}, {what})"
        return None

    def _keep_watch(self) -> None:
        margin = min(6 * self.interval_seconds, self.limit_seconds / 2)
        while not self._stop.wait(self.interval_seconds):
            self._publish()
            self._look_for_verdict()
            if self._limited and time.monotonic() - self._place[2] > self._patience - margin:
                sentence = self._ask_aside()
                if sentence is not None and not self._stop.is_set():
                    self._end(sentence)
        self._publish()

    def _look_for_verdict(self) -> None:
        """Kept for the time when the store is gone, as it is soon after where rank 0's process held it."""
        try:
            if self._verdict is None and self._store is not None and self._store.check(["verdict"]):
                self._verdict = str(self._store.get("verdict").decode())
        except RuntimeError:
            return

    def _linger(self) -> None:
        """The store may live in rank 0's process: it stays until the others have read in it."""
        if self.rank == 0:
            for _ in range(3):
                self._publish()
                time.sleep(self.interval_seconds)

    def _ask_aside(self) -> str | None:
        """`missing` while signs of life go on."""
        answer: list[str | None] = []
        asking = threading.Thread(target=lambda: answer.append(self.missing()), daemon=True)
        asking.start()
        while asking.is_alive():
            self._publish()
            asking.join(self.interval_seconds)
        return answer[0] if answer else None

    def _end(self, sentence: str) -> None:
        # The main thread sits in a collective that no exception reaches.
        try:
            self.on_lost(sentence)
            print(f"megatron_kd: stopped: {sentence}", file=sys.stderr, flush=True)
            self._linger()
        finally:
            os._exit(1)

    def _publish(self) -> None:
        count, what, since = self._place
        self._beat += 1
        sign = {
            "beat": self._beat,
            "count": count,
            "step": self.step,
            "what": what,
            "seconds": time.monotonic() - since,
            "failure": self._failure,
            "process": os.getpid(),
            "host": socket.gethostname(),
        }
        try:
            assert self._store is not None
            self._store.set(str(self.rank), json.dumps(sign))
        except RuntimeError:
            # Whoever holds the store is gone: the collectives will say so.
            return

    def _read(self) -> list[dict[str, Any]]:
        assert self._store is not None
        keys = [str(rank) for rank in range(self.world_size)]
        known = (
            keys if self._store.check(keys) else [key for key in keys if self._store.check([key])]
        )
        signs = dict(zip(known, map(json.loads, self._store.multi_get(known)), strict=True))
        unknown = {
            "beat": 0,
            "count": 0,
            "step": 0,
            "what": "before the first step",
            "seconds": 0,
            "failure": "",
            "process": "?",
            "host": "?",
        }
        return [signs.get(key, unknown) for key in keys]


def _is_communication(error: BaseException) -> bool:
    """Whether an error came out of a collective. gloo raises plain RuntimeErrors that name its source files or the peer."""
    if isinstance(error, dist.DistError):
        return True
    words = (
        "gloo",
        "Connection closed by peer",
        "Connection reset by peer",
        "NCCL",
        "Timed out waiting",
        "ProcessGroup",
    )
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
