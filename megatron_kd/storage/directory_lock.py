"""One run directory, one run: who holds it, and whether he is still there."""

from __future__ import annotations

import fcntl
import getpass
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_kd.config.run_config import ConfigError

LEASE_FILE = ".lease"
BEAT_SECONDS = 10.0
STALE_SECONDS = 120.0


@dataclass(frozen=True)
class Owner:
    """Who holds a lease. born: when the process started, seconds since 1970, which tells it from a later one of the same number."""

    process: int
    born: float
    user: str
    host: str
    since: str

    def __str__(self) -> str:
        return f"process {self.process} of {self.user} on {self.host} since {self.since}"


class LostLeaseError(RuntimeError):
    """Another run holds the directory now."""


def _me() -> Owner:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in containers
        user = str(os.getuid())
    born = psutil.Process().create_time()
    return Owner(os.getpid(), born, user, socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S"))


class Lease:
    """Held from construction to `release`. ConfigError where another process holds it, saying who.

    On one machine the system frees the lock of a process that is gone. Other machines go by its sign of life, the time of the file, which
    is renewed every BEAT_SECONDS and old after `stale_seconds`; that time and "now" both come from the file system, so clocks need
    not agree. took_over: who left it without releasing it, None where nobody did. descriptor: a process that inherits it keeps the
    lease held after this one's end. sentence: what who comes second is told.
    """

    def __init__(
        self,
        directory: Path,
        *,
        stale_seconds: float = STALE_SECONDS,
        beat_seconds: float = BEAT_SECONDS,
        sentence: Callable[[Path, Owner, float], str] | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path, self._stale = directory / LEASE_FILE, stale_seconds
        self.owner = _me()
        self._sentence = sentence or held_sentence
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            found = self._refusal(_lock(self._descriptor, patience=1.0))
            if found is not None:
                raise ConfigError(found)
            self.took_over = _read(self._descriptor)
            self._write(json.dumps(asdict(self.owner)).encode())
        except BaseException:
            os.close(self._descriptor)
            raise
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._beat, args=(beat_seconds,), name="lease", daemon=True
        )
        self._thread.start()

    def _refusal(self, locked: bool) -> str | None:
        owner = _read(self._descriptor)
        if not locked and owner is None:
            return f"run.directory {self.path.parent} is held by a process that has not said its name: wait for it, or choose another"
        age = _age(self.path)
        if owner is None or _is_gone(owner, locked, age, self._stale):
            return None
        return self._sentence(self.path.parent, owner, age)

    @property
    def descriptor(self) -> int:
        """Of the locked file."""
        return self._descriptor

    def _write(self, data: bytes) -> None:
        # In place: the lock belongs to this file, not to its name.
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, data, 0)
        os.fsync(self._descriptor)

    def _beat(self, seconds: float) -> None:
        while not self._stop.wait(seconds):
            try:
                if _read(self._descriptor) == self.owner:
                    os.utime(self._descriptor)
            except OSError:  # a full disk or a lost mount: the next save says so
                continue

    def check(self) -> None:
        """LostLeaseError where another run has taken the directory over, as it may after a silence of `stale_seconds`."""
        try:
            with open(self.path, "rb") as stream:
                found = _parse(stream.read())
        except OSError:
            found = None
        if found != self.owner:
            raise LostLeaseError(
                f"run.directory {self.path.parent} was taken over by {found or 'nobody known'}: this run writes no more"
            )

    def release(self) -> None:
        """Let others have it. May be called twice."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        try:
            if _read(self._descriptor) == self.owner:
                self._write(b"")
        except OSError:
            pass
        finally:
            os.close(self._descriptor)


def holder(
    directory: Path,
    *,
    stale_seconds: float = STALE_SECONDS,
    say: Callable[[str], None] = lambda _sentence: None,
) -> str | None:
    """One sentence about a live process that holds the directory, None without one. Changes nothing; for a look before the work.

    A job that is started again when its machine has died finds a sign of life that is not old yet: another machine's owner is waited for,
    until he gives a new sign or `stale_seconds` are over. say: told that this happens.
    """
    owner, age, gone = _find_owner(directory, stale_seconds)
    if owner is None or gone:
        return None
    if owner.host != socket.gethostname():
        say(
            f"run.directory {directory} was last held by {owner}: waiting up to {stale_seconds - age:.0f} s for a sign of life"
        )
        first, last, deadline = age, age, time.monotonic() + stale_seconds - age
        while not gone and last >= first and time.monotonic() < deadline + 1.0:
            time.sleep(min(1.0, stale_seconds / 10))
            found, last, gone = _find_owner(directory, stale_seconds)
            gone = gone or found is None
            first = max(first, last)
    return None if gone else held_sentence(directory, owner, age)


def _find_owner(directory: Path, stale_seconds: float) -> tuple[Owner | None, float, bool]:
    """Who is named in the lease, seconds since his last sign of life, and whether he is gone."""
    path = directory / LEASE_FILE
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None, 0.0, True
    try:
        # Shared, so that those who only look are not in each other's way.
        owner = _read(descriptor)
        here = owner is not None and owner.host == socket.gethostname()
        locked, owner, age = (
            _lock(descriptor, kind=fcntl.LOCK_SH, patience=1.0 if here else 0.0),
            _read(descriptor),
            _age(path),
        )
    finally:
        os.close(descriptor)
    return owner, age, owner is None or _is_gone(owner, locked, age, stale_seconds)


def held_sentence(directory: Path, owner: Owner, age: float) -> str:
    """What the second run is told."""
    return (
        f"run.directory {directory} is held by {owner} (last sign of life {age:.0f} s ago): two runs in one directory would overwrite "
        "each other's checkpoints; wait for it, stop it, or choose another run.directory"
    )


def _is_gone(owner: Owner, locked: bool, age: float, stale_seconds: float) -> bool:
    """Whether nobody is there any more: a process of this machine that has ended, or one elsewhere that has been silent for too long."""
    if owner.host != socket.gethostname():
        return age > stale_seconds
    if owner.process == os.getpid():
        return locked
    try:
        process = psutil.Process(owner.process)
        # Kernels count the start in hundredths of a second. Where nobody reaps the dead (a container without an init), their numbers stay.
        alive = (
            abs(process.create_time() - owner.born) < 1.0
            and process.status() != psutil.STATUS_ZOMBIE
        )
    except psutil.NoSuchProcess:
        alive = False
    return locked and not alive


def _lock(descriptor: int, *, kind: int = fcntl.LOCK_EX, patience: float) -> bool:
    """Whether no other process has the file's lock; where the file system has no locks, yes. patience: seconds, for those who look, and
    for the last threads of a process that was killed."""
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        except OSError:
            return True
        else:
            return True


def _read(descriptor: int) -> Owner | None:
    return _parse(os.pread(descriptor, 4096, 0))


def _parse(data: bytes) -> Owner | None:
    try:
        content: dict[str, Any] = json.loads(data)
        owner = Owner(**content)
        return (
            owner
            if isinstance(owner.process, int) and isinstance(owner.born, int | float)
            else None
        )
    except (ValueError, TypeError):
        return None


def _age(path: Path) -> float:
    """Seconds since the last sign of life, by the clock of the file system."""
    probe = path.with_name(f"{path.name}-probe-{socket.gethostname()}-{os.getpid()}")
    try:
        probe.touch()
        now = probe.stat().st_mtime
    except OSError:
        now = time.time()
    finally:
        try:
            probe.unlink(missing_ok=True)
        except OSError:
            pass
    try:
        return max(0.0, now - path.stat().st_mtime)
    except OSError:
        return 0.0
