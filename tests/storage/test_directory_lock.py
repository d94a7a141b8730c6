"""Lock a run directory for one run; replace owners that have died or fallen silent."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_kd.config import ConfigError
from megatron_kd.storage.directory_lock import (
    LOCK_FILE,
    DirectoryLock,
    DirectoryLockedError,
    Heartbeat,
    LostLockError,
    Owner,
    lock_conflict,
)
from tests.helpers.tools import ROOT

HOLD = """
import sys; from pathlib import Path; from megatron_kd.storage.directory_lock import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1])); print("held", flush=True); input()
"""


def hold(directory: Path) -> subprocess.Popen[str]:
    """Start another process that holds the directory."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def write_remote_lock(directory: Path, age: float) -> Owner:
    """Write the lock of a process on another machine, `age` seconds after its last heartbeat."""
    owner = Owner(4711, time.time(), "somebody", "another-host", "2026-01-01 00:00:00")
    path = directory / LOCK_FILE
    path.write_text(json.dumps(owner.__dict__))
    os.utime(path, (time.time() - age, time.time() - age))
    return owner


@pytest.mark.fault(15)
def test_second_run_is_told_who_holds_it(tmp_path: Path) -> None:
    other = hold(tmp_path)
    try:
        message = (
            rf"is held by process {other.pid} of \S+ on {socket.gethostname()} since \d{{4}}-.*"
            "two runs in one directory"
        )
        with pytest.raises(ConfigError, match=message):
            DirectoryLock(tmp_path)
        assert f"process {other.pid} " in (lock_conflict(tmp_path) or "")
    finally:
        end(other)
    # The process was killed without a release: the next lock names its predecessor.
    assert lock_conflict(tmp_path) is None
    lock = DirectoryLock(tmp_path)
    assert lock.took_over is not None
    assert lock.took_over.process == other.pid
    assert "is held by" in (lock_conflict(tmp_path) or ""), "this process's lock, from outside"
    lock.release()
    lock.release()
    assert lock_conflict(tmp_path) is None
    second_lock = DirectoryLock(tmp_path)
    assert second_lock.took_over is None
    second_lock.release()


def test_zombie_process_has_ended(tmp_path: Path) -> None:
    """Treat a killed process as ended though no parent reaps it, as in a container without init."""
    other = hold(tmp_path)
    try:
        other.kill()
        deadline = time.monotonic() + 20
        while (
            psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE
            and time.monotonic() < deadline
        ):
            time.sleep(0.02)
        assert lock_conflict(tmp_path) is None
        lock = DirectoryLock(tmp_path)
        assert lock.took_over is not None
        assert lock.took_over.process == other.pid
        lock.release()
    finally:
        end(other)


@pytest.mark.fault(15)
def test_other_machine_by_its_sign_of_life(tmp_path: Path) -> None:
    owner = write_remote_lock(tmp_path, 100.0)
    with pytest.raises(
        ConfigError,
        match=r"process 4711 of somebody on another-host .*last sign of life 1\d\d s ago",
    ):
        DirectoryLock(tmp_path, heartbeat=Heartbeat(stale_seconds=600.0))
    write_remote_lock(tmp_path, 700.0)
    lock = DirectoryLock(tmp_path, heartbeat=Heartbeat(0.05, stale_seconds=600.0))
    assert lock.took_over is not None
    assert replace(lock.took_over, born=0) == replace(owner, born=0)
    os.utime(tmp_path / LOCK_FILE, (1, 1))
    deadline = time.monotonic() + 20
    while (tmp_path / LOCK_FILE).stat().st_mtime < time.time() - 60 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (tmp_path / LOCK_FILE).stat().st_mtime > time.time() - 60, "no heartbeat"
    lock.check()
    # From outside, only a new heartbeat proves that the owner lives.
    write_remote_lock(tmp_path, 1.0)
    reports: list[str] = []
    assert lock_conflict(tmp_path, stale_seconds=3.0, report=reports.append) is None
    assert "waiting up to 2 s for a sign of life" in reports[0]
    write_remote_lock(tmp_path, 1.0)
    heartbeat = threading.Timer(0.7, os.utime, [tmp_path / LOCK_FILE])
    heartbeat.start()
    assert "process 4711 of somebody on another-host" in (
        lock_conflict(tmp_path, stale_seconds=30.0) or ""
    )
    # A machine that slept for longer than the limit wakes up after another owner took over.
    write_remote_lock(tmp_path, 0.0)
    with pytest.raises(
        LostLockError, match="taken over by process 4711 of somebody on another-host"
    ):
        lock.check()
    lock.release()
    assert "another-host" in (tmp_path / LOCK_FILE).read_text(), "the new owner's lock must stay"


def test_unreadable_lock_file_names_no_owner(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_bytes(b'{"process": "x"')
    assert lock_conflict(tmp_path) is None
    DirectoryLock(tmp_path).release()


def test_lock_without_heartbeat(tmp_path: Path) -> None:
    """Writers of a cache: the owner stands in the file as text, and a silent file is free."""
    path = tmp_path / ".writer-00000.lock"
    path.write_text("process 4711 of some body on another-host since 2026-01-01 00:00:00")
    lock = DirectoryLock(tmp_path, file_name=path.name, heartbeat=None)
    assert path.read_text() == str(lock.owner)
    with pytest.raises(DirectoryLockedError) as error:
        DirectoryLock(tmp_path, file_name=path.name, heartbeat=None)
    assert str(error.value.owner) == str(lock.owner)
    lock.release()
    assert path.read_bytes() == b""
    DirectoryLock(tmp_path, file_name=path.name, heartbeat=None).release()
