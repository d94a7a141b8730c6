"""Exchange heartbeats, and report which rank is missing when a collective hangs.

A rank that never enters a collective stops all others, with a message about sockets or with none.
So each rank publishes its current phase in the rendezvous store, a few bytes a second from a thread
of its own. The other ranks read it only when something goes wrong.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist

_MAX_NAMED = 8  # ranks that one message names
# Ranks that read all heartbeats. The others read the verdict, because a store serves thousands of
# clients one after the other.
_MAX_READERS = 32

_UNKNOWN: dict[str, Any] = {
    "beat": 0,
    "count": 0,
    "step": 0,
    "what": "before the first step",
    "seconds": 0,
    "failure": "",
    "process": "?",
    "host": "?",
}


class LostRankError(RuntimeError):
    """Report another rank that died, stopped or is behind. The message names it and its phase."""


class _Phase(NamedTuple):
    """Describe what a rank is doing: its running number, its name, and when it began."""

    number: int
    name: str
    since: float


class Watchdog:
    """Publish this rank's phase, and find the rank that the others wait for.

    Every rank enters the same phases in the same order. Use the watchdog as a context manager.
    Inside it a thread publishes heartbeats. It ends the process (exit code 1) when this rank has
    been in one phase for nearly `limit_seconds` because another rank is silent or behind. A
    communication error leaves the context as LostRankError if a rank is missing. Any other error is
    published.

    Args:
        store: Rendezvous store of the world; None turns the watchdog off.
        rank: This rank of the world.
        world_size: Ranks of the world. The watchdog is off in a world of one.
        limit_seconds: Longest wait, as for a collective.
        interval_seconds: Time between two heartbeats. None: one second per thousand ranks, at least
            one.
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
        self._store = None
        if store is not None and world_size > 1:
            # A client of its own: a client handles one request at a time, and the run uses it too.
            self._store = dist.PrefixStore("watch", store.clone())  # type: ignore[attr-defined]
        self.step = 0
        self.on_lost: Callable[[str], None] = lambda _message: None
        self._phase = _Phase(0, "starting", time.monotonic())
        self._failure = ""
        self._verdict: str | None = None
        self._beat = 0
        self._is_limited = False
        self._phase_limit_seconds = limit_seconds
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def enter_phase(
        self, name: str, *, limited: bool = True, limit_seconds: float | None = None
    ) -> None:
        """Begin a phase on this rank.

        Args:
            name: What the rank does, for messages: "reading data".
            limited: False if the phase may take any time.
            limit_seconds: Limit of a phase that may take longer than a collective, such as a
                checkpoint.
        """
        self._is_limited = limited
        self._phase_limit_seconds = max(limit_seconds or 0.0, self.limit_seconds)
        self._phase = _Phase(self._phase.number + 1, name, time.monotonic())

    def __enter__(self) -> Watchdog:
        if self._store is not None and self._thread is None:
            self._publish()
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self._store is None:
            return
        self._is_limited = False
        message = None
        if error is not None and _is_communication(error):
            message = self.missing()
        elif error is not None:
            self._failure = f"{type(error).__name__}: {str(error)[:300]}"
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10 * self.interval_seconds)
            self._thread = None
        if message is not None:
            self._keep_store_alive()
            raise LostRankError(message) from error

    def missing(self) -> str | None:
        """Return a message about the ranks that failed, are silent or are behind this one, or None.

        It takes about three intervals. A rank without a heartbeat in that time is silent.
        """
        try:
            verdict = self._verdict
            if verdict is None and self.rank >= _MAX_READERS:
                verdict = self._wait_for_verdict()
            if verdict is not None:
                return verdict
            heartbeats = self._read()
            time.sleep(3 * self.interval_seconds)
            verdict = self._judge(heartbeats, self._read())
            if verdict is not None and self._store is not None:
                self._store.set("verdict", verdict)
        except RuntimeError:
            return (
                self._verdict
                or "the rendezvous store does not answer: the process that holds it (rank 0's, or "
                "its launcher) is gone"
            )
        return verdict

    def _wait_for_verdict(self) -> str | None:
        assert self._store is not None
        for _ in range(8):
            if self._store.check(["verdict"]):
                return str(self._store.get("verdict").decode())
            time.sleep(self.interval_seconds)
        return None

    def _judge(
        self, old_beats: list[dict[str, Any]], new_beats: list[dict[str, Any]]
    ) -> str | None:
        """Compare two readings of all heartbeats, in rank order, and blame the ranks at fault."""
        count, phase, _ = self._phase
        newest = max(count, *(beat["count"] for beat in new_beats))
        failed, silent, behind = [], [], []
        for rank, (old, new) in enumerate(zip(old_beats, new_beats, strict=True)):
            name = f"rank {rank} (process {new['process']} on {new['host']})"
            position = f"step {new['step']}, {new['what']}"
            if new["failure"]:
                failed.append(f"{name} failed at {position}: {new['failure']}")
            elif rank != self.rank and old["beat"] == new["beat"]:
                silent.append(f"{name} gives no sign of life since {position}")
            elif (count if rank == self.rank else new["count"]) < newest:
                behind.append(f"{name} is still at {position}, for {new['seconds']:.0f} s")
        blamed = failed or silent or behind
        if not blamed:
            return None
        more = f"; and {len(blamed) - _MAX_NAMED} more" if len(blamed) > _MAX_NAMED else ""
        return (
            f"{'; '.join(blamed[:_MAX_NAMED])}{more} "
            f"(rank {self.rank} waits at step {self.step}, {phase})"
        )

    def _run(self) -> None:
        """Publish heartbeats in the thread, and end the process if the phase takes too long."""
        margin = min(6 * self.interval_seconds, self.limit_seconds / 2)
        while not self._stop.wait(self.interval_seconds):
            self._publish()
            self._fetch_verdict()
            elapsed = time.monotonic() - self._phase.since
            if self._is_limited and elapsed > self._phase_limit_seconds - margin:
                message = self._missing_with_heartbeats()
                if message is not None and not self._stop.is_set():
                    self._end_process(message)
        self._publish()

    def _fetch_verdict(self) -> None:
        """Copy the verdict, since the store ends soon after rank 0's process if that holds it."""
        try:
            if self._verdict is None and self._store is not None and self._store.check(["verdict"]):
                self._verdict = str(self._store.get("verdict").decode())
        except RuntimeError:
            return

    def _keep_store_alive(self) -> None:
        """Wait on rank 0, whose process may hold the store, until the other ranks have read it."""
        if self.rank == 0:
            for _ in range(3):
                self._publish()
                time.sleep(self.interval_seconds)

    def _missing_with_heartbeats(self) -> str | None:
        """Return `missing`, and publish heartbeats meanwhile."""
        messages: list[str | None] = []
        reader = threading.Thread(target=lambda: messages.append(self.missing()), daemon=True)
        reader.start()
        while reader.is_alive():
            self._publish()
            reader.join(self.interval_seconds)
        return messages[0] if messages else None

    def _end_process(self, message: str) -> None:
        # The main thread is in a collective, which no exception interrupts.
        try:
            self.on_lost(message)
            print(f"megatron_kd: stopped: {message}", file=sys.stderr, flush=True)
            self._keep_store_alive()
        finally:
            os._exit(1)

    def _publish(self) -> None:
        self._beat += 1
        heartbeat = {
            "beat": self._beat,
            "count": self._phase.number,
            "step": self.step,
            "what": self._phase.name,
            "seconds": time.monotonic() - self._phase.since,
            "failure": self._failure,
            "process": os.getpid(),
            "host": socket.gethostname(),
        }
        try:
            assert self._store is not None
            self._store.set(str(self.rank), json.dumps(heartbeat))
        except RuntimeError:
            # The process that holds the store is gone. The collectives will report it.
            return

    def _read(self) -> list[dict[str, Any]]:
        """Return the last heartbeat of every rank, in rank order."""
        assert self._store is not None
        keys = [str(rank) for rank in range(self.world_size)]
        written_keys = (
            keys if self._store.check(keys) else [key for key in keys if self._store.check([key])]
        )
        values = map(json.loads, self._store.multi_get(written_keys))
        heartbeats = dict(zip(written_keys, values, strict=True))
        return [heartbeats.get(key, _UNKNOWN) for key in keys]


def _is_communication(error: BaseException) -> bool:
    """Return True if an error came out of a collective.

    gloo raises plain RuntimeErrors that name its source files or the peer.
    """
    if isinstance(error, dist.DistError):
        return True
    phrases = (
        "gloo",
        "Connection closed by peer",
        "Connection reset by peer",
        "NCCL",
        "Timed out waiting",
        "ProcessGroup",
    )
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)
