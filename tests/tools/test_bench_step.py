"""The step benchmarks on tiny runs: all figures, and ratios of the times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = (
    "--rounds 2 --hidden 32 --layers 1 --teacher-hidden 64 --teacher-layers 1 --vocab 300 "
    "--sequence 16 --batch 2 --micro-batch 1 --top-k 8"
)
TWO_RANKS = "-m torch.distributed.run --standalone --nproc-per-node 2"


@pytest.mark.dist
def test_a_tiny_run(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "tools/bench_step.py",
        *SMALL.split(),
        "--json",
        "--output",
        str(tmp_path / "step.json"),
    ]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result == json.loads((tmp_path / "step.json").read_text())
    assert all(spread["min"] > 0 for spread in result["seconds"].values())
    assert set(result["seconds"]) == {"plain", "online", "teacher"}
    ratio = result["online / (plain + teacher)"]
    assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    assert result["versions"]["torch"]
    assert result["commit"]


@pytest.mark.dist
@pytest.mark.slow
def test_a_teacher_in_a_separate_layout() -> None:
    launch = f"{TWO_RANKS} tools/bench_step.py --teacher-tensor 2".split()
    process = subprocess.run(
        [sys.executable, *launch, *SMALL.split(), "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout[process.stdout.index("{") :])
    assert result["online / (plain + teacher)"]["min"] > 0
    assert result["settings"]["teacher_tensor"] == 2


LAYOUTS = (
    "--rounds 2 --hidden 64 --layers 2 --teacher-hidden 128 --teacher-layers 2 --vocab 300 "
    "--sequence 16 --batch 8 --micro-batch 2"
)


@pytest.mark.dist
@pytest.mark.slow
def test_layouts() -> None:
    launch = f"{TWO_RANKS} tools/bench_layout.py --student 1x2 --teacher same,2x1"
    command = [
        sys.executable,
        *launch.split(),
        *LAYOUTS.split(),
        "--overlap",
        "none,drain",
        "--json",
    ]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert process.returncode == 0, process.stderr
    runs = json.loads(process.stdout[process.stdout.index("{") :])["runs"]
    assert [run["kind"] for run in runs] == [
        "plain",
        "cached",
        "teacher",
        "online",
        "online",
        "plain",
        "teacher",
        "online",
        "online",
    ]
    assert [run["ahead"] for run in runs if run["kind"] == "online"] == [False, True, False, True]
    for run in runs:
        assert 0 < run["seconds"]["min"] <= run["seconds"]["median"]
        assert 0 <= run["waiting"] < 1
        assert run["communication"] == max(0.0, run["waiting"] - run["bubble"])
    # Four microbatches in two stages: one slot of five is empty.
    assert runs[0]["bubble"] == pytest.approx(0.2)
    assert runs[6]["bubble"] == 0
    ratios = {"online / plain", "online / (plain + teacher)", "drain / none"}
    assert runs[4]["ratios"].keys() == ratios | {f"processor seconds: {name}" for name in ratios}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--student 3", "3 is not a layout: write TENSORxPIPELINE"),
        ("--student 1x3", "num_layers (4) must be a multiple of parallel.pipeline"),
        ("--student 1x1 --teacher 1x4", "1 processes cannot be split into teacher.parallel.tensor"),
        ("--kinds fast", "--kinds: fast is none of plain"),
    ],
)
def test_a_layout_that_does_not_fit(options: str, words: str) -> None:
    process = subprocess.run(
        [sys.executable, "tools/bench_layout.py", *options.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert process.returncode == 2, process.stderr
    assert words in process.stderr, process.stderr
