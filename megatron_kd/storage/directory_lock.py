"""Lock a directory for one process, with a heartbeat that other machines can see.

Run directories and sweep folders are locked with a heartbeat in `.lease`. Writers of a cache lock
files of their own without one: they rely on `flock` alone, so that a job that was killed can be
started again on another machine at once.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_kd.config import ConfigError

LOCK_FILE = ".lease"
_TEXT_FORM = re.compile(r"process (\d+) of (.+) on (\S+) since (.+)")


@dataclass(frozen=True)
class Owner:
    """Identify the process that holds a lock.

    Attributes:
        process: process id.
        born: start of the process, seconds since 1970. It distinguishes the process from a later
            one with the same id.
        user: name of its user, or the numeric id where the user has no name.
        host: name of its machine.
        since: local time at which the lock was taken.
    """

    process: int
    born: float
    user: str
    host: str
    since: str

    def __str__(self) -> str:
        return f"process {self.process} of {self.user} on {self.host} since {self.since}"

    @classmethod
    def current(cls) -> Owner:
        """Return this process as an owner."""
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a user id without a name, as in containers
            user = str(os.getuid())
        born = psutil.Process().create_time()
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(os.getpid(), born, user, socket.gethostname(), since)

    @property
    def is_local(self) -> bool:
        """Return True if the owner runs, or ran, on this machine."""
        return self.host == socket.gethostname()


@dataclass(frozen=True)
class Heartbeat:
    """Set how often the owner renews its lock, and when others may take it over.

    Attributes:
        interval_seconds: time between two renewals of the lock file's modification time.
        stale_seconds: a lock of another machine that is older than this is taken over.
    """

    interval_seconds: float = 10.0
    stale_seconds: float = 120.0


DEFAULT_HEARTBEAT = Heartbeat()


class DirectoryLockedError(ConfigError):
    """Report that another process has locked the directory.

    Attributes:
        owner: the process that holds the lock, None where the lock file names none.
        age: seconds since its last heartbeat.
    """

    def __init__(self, message: str, owner: Owner | None, age: float) -> None:
        super().__init__(message)
        self.owner, self.age = owner, age


class LostLockError(RuntimeError):
    """Report that another run has taken the directory over."""


class DirectoryLock:
    """Hold a directory exclusively from construction to `release`.

    On one machine the operating system frees the lock of a process that has ended. Processes on
    other machines read the modification time of the lock file, which `heartbeat` renews. That time
    and the present time both come from the file system, so clocks need not agree.

    Args:
        directory: directory to lock; created if missing.
        file_name: name of the lock file in it. The file stays after the release: deleting it would
            let two processes lock two files of the same name.
        heartbeat: None relies on `flock` alone.

    Attributes:
        owner: this process.
        took_over: the owner that ended without releasing the lock, else None.

    Raises:
        DirectoryLockedError: another process holds the lock.
        OSError: the lock file cannot be created or written.
    """

    def __init__(
        self,
        directory: Path,
        *,
        file_name: str = LOCK_FILE,
        heartbeat: Heartbeat | None = DEFAULT_HEARTBEAT,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path, self.owner, self._heartbeat = directory / file_name, Owner.current(), heartbeat
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._refuse_locked(_flock(self._descriptor, patience=1.0 if heartbeat else 0.0))
            self.took_over = _read_owner(self._descriptor)
            record = json.dumps(asdict(self.owner)) if heartbeat else str(self.owner)
            self._write(record.encode())
        except BaseException:
            os.close(self._descriptor)
            raise
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if heartbeat is not None:
            self._thread = threading.Thread(
                target=self._beat, args=(heartbeat.interval_seconds,), name="lease", daemon=True
            )
            self._thread.start()

    def _refuse_locked(self, acquired: bool | None) -> None:
        """Raise DirectoryLockedError unless the lock is free. `acquired`: see `_flock`."""
        owner, age = _read_owner(self._descriptor), 0.0
        if self._heartbeat is None:
            free = acquired is True
        elif owner is None:
            free = acquired is not False
        else:
            age = _seconds_since_heartbeat(self.path)
            free = _has_ended(owner, acquired is not False, age, self._heartbeat.stale_seconds)
        if not free:
            raise DirectoryLockedError(_locked_message(self.path.parent, owner, age), owner, age)

    @property
    def descriptor(self) -> int:
        """Return the descriptor of the lock file.

        A child process that inherits it keeps the directory locked after this process has ended.
        """
        return self._descriptor

    def _write(self, data: bytes) -> None:
        # In place: the lock belongs to this file, not to its name.
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, data, 0)
        os.fsync(self._descriptor)

    def _beat(self, interval_seconds: float) -> None:
        while not self._stop.wait(interval_seconds):
            try:
                if _read_owner(self._descriptor) == self.owner:
                    os.utime(self._descriptor)
            except OSError:  # a full disk or a lost mount: the next save reports it
                continue

    def check(self) -> None:
        """Raise LostLockError if another run has taken the directory over.

        Another run may do so after `stale_seconds` without a heartbeat.
        """
        try:
            owner = _parse_owner(self.path.read_bytes())
        except OSError:
            owner = None
        if owner != self.owner:
            raise LostLockError(
                f"run.directory {self.path.parent} was taken over by "
                f"{owner or 'an unknown process'}: this run writes no more"
            )

    def release(self) -> None:
        """Unlock the directory. Calling it again has no effect."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            if self._thread is None or _read_owner(self._descriptor) == self.owner:
                self._write(b"")
        except OSError:
            pass
        finally:
            os.close(self._descriptor)


def lock_conflict(
    directory: Path,
    *,
    stale_seconds: float = DEFAULT_HEARTBEAT.stale_seconds,
    report: Callable[[str], None] = lambda _message: None,
) -> str | None:
    """Return an error message if a live process holds `directory`, else None. Change nothing.

    A job that is restarted after its machine has died finds a heartbeat that is still recent. For
    an owner on another machine the function therefore waits for a new heartbeat, until
    `stale_seconds` have passed since the last one.

    Args:
        directory: run directory or sweep folder.
        stale_seconds: age of a heartbeat beyond which its owner counts as dead.
        report: is called with one sentence when the function starts to wait.
    """
    owner, age, ended = _read_state(directory, stale_seconds)
    if owner is None or ended:
        return None
    if not owner.is_local:
        report(
            f"run.directory {directory} was last locked by {owner}: waiting up to "
            f"{stale_seconds - age:.0f} s for a sign of life"
        )
        ended = not _beats_again(directory, age, stale_seconds)
    return None if ended else _locked_message(directory, owner, age)


def _beats_again(directory: Path, age: float, stale_seconds: float) -> bool:
    """Return True if a new heartbeat appears, or if the last one is not stale at the deadline."""
    oldest, latest, ended = age, age, False
    deadline = time.monotonic() + stale_seconds - age
    while not ended and latest >= oldest and time.monotonic() < deadline + 1.0:
        time.sleep(min(1.0, stale_seconds / 10))
        _owner, latest, ended = _read_state(directory, stale_seconds)
        oldest = max(oldest, latest)
    return not ended


def _read_state(directory: Path, stale_seconds: float) -> tuple[Owner | None, float, bool]:
    """Return the owner, seconds since its last heartbeat, and whether it has ended."""
    path = directory / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None, 0.0, True
    try:
        owner = _read_owner(descriptor)
        patience = 1.0 if owner is not None and owner.is_local else 0.0
        # A shared lock, so that readers do not exclude each other.
        acquired = _flock(descriptor, kind=fcntl.LOCK_SH, patience=patience) is not False
        owner, age = _read_owner(descriptor), _seconds_since_heartbeat(path)
    finally:
        os.close(descriptor)
    return owner, age, owner is None or _has_ended(owner, acquired, age, stale_seconds)


def _locked_message(directory: Path, owner: Owner | None, age: float) -> str:
    if owner is None:
        return (
            f"run.directory {directory} is locked by a process that did not record its name: "
            "wait for it, or choose another"
        )
    return (
        f"run.directory {directory} is held by {owner} (last sign of life {age:.0f} s ago): "
        "two runs in one directory would overwrite each other's checkpoints; wait for it, stop it, "
        "or choose another run.directory"
    )


def _has_ended(owner: Owner, acquired: bool, age: float, stale_seconds: float) -> bool:
    """Return True if a process of this machine has ended, or one of another machine is silent."""
    if not owner.is_local:
        return age > stale_seconds
    if owner.process == os.getpid():
        return acquired
    try:
        process = psutil.Process(owner.process)
        # Kernels count the start time in hundredths of a second. The number of an ended process
        # stays taken where no parent waits for it, as in a container without an init process.
        alive = (
            abs(process.create_time() - owner.born) < 1.0
            and process.status() != psutil.STATUS_ZOMBIE
        )
    except psutil.NoSuchProcess:
        alive = False
    return acquired and not alive


def _flock(descriptor: int, *, kind: int = fcntl.LOCK_EX, patience: float) -> bool | None:
    """Return True if the file's lock was acquired, None where the file system has no locks.

    Try for `patience` seconds: readers hold the lock for a moment, and so do the last threads of a
    process that was killed.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        except OSError:
            return None
        else:
            return True


def _read_owner(descriptor: int) -> Owner | None:
    return _parse_owner(os.pread(descriptor, 4096, 0))


def _parse_owner(data: bytes) -> Owner | None:
    """Return the owner that a lock file names, in either form; None for anything else."""
    text = data.decode(errors="replace").strip()
    match = _TEXT_FORM.fullmatch(text)
    if match is not None:
        return Owner(int(match[1]), 0.0, match[2], match[3], match[4])
    try:
        content: dict[str, Any] = json.loads(text)
        owner = Owner(**content)
    except (ValueError, TypeError):
        return None
    valid = isinstance(owner.process, int) and isinstance(owner.born, int | float)
    return owner if valid else None


def _seconds_since_heartbeat(path: Path) -> float:
    """Return the age of the lock file by the clock of the file system, seconds."""
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
