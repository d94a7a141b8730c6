"""Test that a cache keeps finished shards when its writer fails."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_kd.cache import CacheReader, CacheWriter
from tests.cache.cache_samples import IDENTITY, samples
from tests.losses.cases import fresh_seed

KILLED = """
import sys, torch
from pathlib import Path
from megatron_kd.cache import CacheWriter
from tests.cache.cache_samples import IDENTITY, samples
with CacheWriter(sys.argv[1], IDENTITY, shard_samples=3) as writer:
    print("ready", flush=True)
    for tokens, target in samples(int(sys.argv[2]), 100000):
        writer.add(tokens, target)
"""


@pytest.mark.fault(3)
def test_a_killed_writer_leaves_finished_shards_only(tmp_path: Path) -> None:
    seed = fresh_seed()
    for attempt in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, tmp_path, str(seed + attempt)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.3 + random.random())
        process.send_signal(signal.SIGKILL)
        process.communicate()
        reader = CacheReader(tmp_path, expect=IDENTITY)
        assert len(reader) == 3 * len(reader.shards)
        for key in reader.keys():
            reader.record(key)
    with CacheWriter(tmp_path, IDENTITY) as writer:  # The lock ended with its owner.
        writer.add(*samples(seed + 9, 1)[0])
    assert not list(tmp_path.glob(".*partial*"))


@pytest.mark.fault(6)
def test_a_full_disk_keeps_what_is_finished(tmp_path: Path) -> None:
    """Use the system's limit on file sizes, in a separate process."""
    program = """
import resource, signal, sys
from megatron_kd.cache import CacheWriter
from tests.cache.cache_samples import IDENTITY, samples
made = samples(1, 400)
with CacheWriter(sys.argv[1], IDENTITY, shard_samples=40) as writer:
    for tokens, target in made[:50]:
        writer.add(tokens, target)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
try:
    with CacheWriter(sys.argv[1], IDENTITY, worker=1, shard_samples=400) as writer:
        for tokens, target in made:
            writer.add(tokens, target)
except OSError as error:
    print("stopped", error.errno)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("stopped"), done.stderr
    assert len(CacheReader(tmp_path)) == 50
    assert not list(tmp_path.glob(".*partial*"))
