"""The step benchmark on a tiny run: every figure it promises, and ratios of what it timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = (
    "--rounds 2 --hidden 32 --layers 1 --teacher-hidden 64 --teacher-layers 1 --vocab 300 --sequence 16 --batch 2 --micro-batch 1 --top-k 8"
)


@pytest.mark.dist
def test_a_tiny_run(tmp_path: Path) -> None:
    command = [sys.executable, "tools/bench_step.py", *SMALL.split(), "--json", "--output", str(tmp_path / "step.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "step.json").read_text())
    assert all(spread["min"] > 0 for spread in result["seconds"].values()) and set(result["seconds"]) == {"plain", "online", "teacher"}
    ratio = result["online / (plain + teacher)"]
    assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"] and result["versions"]["torch"] and result["commit"]


@pytest.mark.dist
@pytest.mark.slow
def test_a_teacher_in_its_own_layout() -> None:
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2 tools/bench_step.py --teacher-tensor 2".split()
    done = subprocess.run([sys.executable, *launch, *SMALL.split(), "--json"], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout[done.stdout.index("{") :])
    assert result["online / (plain + teacher)"]["min"] > 0 and result["settings"]["teacher_tensor"] == 2
