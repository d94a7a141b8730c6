"""Two runs on one run directory: the second hears who has it; what a dead or silent one left is taken over."""

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
from megatron_kd.storage.directory_lock import LEASE_FILE, Lease, LostLeaseError, Owner, holder
from tests.helpers.tools import ROOT

HOLD = """
import sys; from pathlib import Path; from megatron_kd.storage.directory_lock import Lease
lease = Lease(Path(sys.argv[1])); print("held", flush=True); input()
"""


def hold(directory: Path) -> subprocess.Popen[str]:
    """Another process that holds the directory."""
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


@pytest.mark.fault(15)
def test_second_run_is_told_who_holds_it(tmp_path: Path) -> None:
    other = hold(tmp_path)
    try:
        words = rf"is held by process {other.pid} of \S+ on {socket.gethostname()} since \d{{4}}-.*two runs in one directory"
        with pytest.raises(ConfigError, match=words):
            Lease(tmp_path)
        assert f"process {other.pid} " in (holder(tmp_path) or "")
    finally:
        end(other)
    # Killed: nobody released it, and the next one says whom it follows.
    assert holder(tmp_path) is None
    lease = Lease(tmp_path)
    assert lease.took_over is not None
    assert lease.took_over.process == other.pid
    assert "is held by" in (holder(tmp_path) or ""), "this process's own lease, seen from outside"
    lease.release()
    lease.release()
    assert holder(tmp_path) is None
    again = Lease(tmp_path)
    assert again.took_over is None
    again.release()


def test_ended_and_not_yet_buried(tmp_path: Path) -> None:
    """Where nobody reaps the dead, as in a container without an init process, a killed run's number stays taken."""
    other = hold(tmp_path)
    try:
        other.kill()
        deadline = time.monotonic() + 20
        while (
            psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE
            and time.monotonic() < deadline
        ):
            time.sleep(0.02)
        assert holder(tmp_path) is None
        lease = Lease(tmp_path)
        assert lease.took_over is not None
        assert lease.took_over.process == other.pid
        lease.release()
    finally:
        end(other)


def elsewhere(directory: Path, age: float) -> Owner:
    """A lease left by a process of another machine, `age` seconds after its last sign of life."""
    owner = Owner(4711, time.time(), "somebody", "another-host", "2026-01-01 00:00:00")
    path = directory / LEASE_FILE
    path.write_text(json.dumps(owner.__dict__))
    os.utime(path, (time.time() - age, time.time() - age))
    return owner


@pytest.mark.fault(15)
def test_other_machine_by_its_sign_of_life(tmp_path: Path) -> None:
    owner = elsewhere(tmp_path, 100.0)
    with pytest.raises(
        ConfigError,
        match=r"process 4711 of somebody on another-host .*last sign of life 1\d\d s ago",
    ):
        Lease(tmp_path, stale_seconds=600.0)
    elsewhere(tmp_path, 700.0)
    lease = Lease(tmp_path, stale_seconds=600.0, beat_seconds=0.05)
    assert lease.took_over is not None
    assert replace(lease.took_over, born=0) == replace(owner, born=0)
    os.utime(tmp_path / LEASE_FILE, (1, 1))
    deadline = time.monotonic() + 20
    while (
        tmp_path / LEASE_FILE
    ).stat().st_mtime < time.time() - 60 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (tmp_path / LEASE_FILE).stat().st_mtime > time.time() - 60, "no sign of life"
    lease.check()
    # Seen from outside: a new sign of life is waited for, not only a fresh one believed.
    elsewhere(tmp_path, 1.0)
    said: list[str] = []
    assert holder(tmp_path, stale_seconds=3.0, say=said.append) is None
    assert "waiting up to 2 s for a sign of life" in said[0]
    elsewhere(tmp_path, 1.0)
    beating = threading.Timer(0.7, os.utime, [tmp_path / LEASE_FILE])
    beating.start()
    assert "process 4711 of somebody on another-host" in (
        holder(tmp_path, stale_seconds=30.0) or ""
    )
    # A machine that slept for longer than the limit wakes up and finds another owner.
    elsewhere(tmp_path, 0.0)
    with pytest.raises(
        LostLeaseError, match="taken over by process 4711 of somebody on another-host"
    ):
        lease.check()
    lease.release()
    assert "another-host" in (tmp_path / LEASE_FILE).read_text(), "the new owner's lease must stay"


def test_unreadable_lease_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / LEASE_FILE).write_bytes(b'{"process": "x"')
    assert holder(tmp_path) is None
    Lease(tmp_path).release()
