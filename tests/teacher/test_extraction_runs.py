"""Store a teacher's targets through kills, full disks and second writers."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_kd.cache.writer import lock_writer
from tests.helpers.tiny import write_tokens
from tests.teacher.stored_runs import extraction, records, student
from tests.train.test_program import finish, kill_tree, start

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]


@pytest.mark.slow
@pytest.mark.fault(3)
def test_extraction_killed_and_resumed_with_other_processes(
    teacher: tuple[Path, str], tmp_path: Path, measured: Callable[[str], None]
) -> None:
    """Kill at random moments with 2, then 1, then 3 processes.

    In the end there are the records of a complete run, bit for bit.
    """
    # Enough samples that a fast machine is not done when the signal arrives.
    many = (teacher[0], write_tokens(tmp_path, tokens=40_000))
    run_file = student(
        tmp_path, "student", many, batch={"global_batch_size": 12, "micro_batch_size": 2}
    )
    complete, broken = tmp_path / "complete", tmp_path / "broken"
    code, output = finish(start(extraction(run_file, complete, "--shard-samples", "4")))
    assert code == 0, output
    for ranks in (2, 1, 3):
        process = start(extraction(run_file, broken, "--shard-samples", "4", ranks=ranks))
        before = len(list(broken.glob("*.json"))) if broken.exists() else 0
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if broken.exists() and len(list(broken.glob("*.json"))) > before + 3:
                break
            time.sleep(0.02)
        time.sleep(0.2 * random.random())
        kill_tree(process)
        process.communicate()
    assert 0 < len(records(broken)) < len(records(complete))
    measured(
        f"killed on 2, 1 and 3 processes with {len(records(broken))} of {len(records(complete))} "
        "records; then the same bytes"
    )
    code, output = finish(start(extraction(run_file, broken, "--shard-samples", "4", ranks=2)))
    assert code == 0, output
    assert records(broken) == records(complete)
    assert {p.name for p in broken.glob("shard-*")} == {p.name for p in complete.glob("shard-*")}


@pytest.mark.slow
@pytest.mark.fault(6, 15)
def test_two_writers_and_a_full_disk(teacher: tuple[Path, str], tmp_path: Path) -> None:
    run_file = student(tmp_path, "student", teacher)
    cache = tmp_path / "cache"
    lock = lock_writer(cache / ".job-00000.lock")
    code, output = finish(start(extraction(run_file, cache)))
    lock.release()
    assert code == 3, output
    assert f"is being written by process {os.getpid()} of" in output, output
    limited = [
        "bash",
        "-c",
        'ulimit -f 16; trap "" XFSZ; exec "$@"',
        "bash",
        *extraction(
            run_file, tmp_path / "full", "--shard-samples", "500", "--value-encoding", "fp32"
        ),
    ]
    process = subprocess.Popen(
        limited,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    code, output = finish(process)
    assert code == 5, output
    assert "finished shards are kept" in output, output
