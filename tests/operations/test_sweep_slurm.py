"""tools/sweep.py --slurm on a real Slurm: arrays in order, a requeued run, no repetition."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_kd.sweep.results.sweep_results import read_result
from tests.helpers.slurm import Cluster, missing
from tests.helpers.slurm_site import HOSTILE, whole_rows
from tests.helpers.sweeps import TOOL, write_sweep
from tests.helpers.tiny import write_tokens

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
STEPS = 800
SWEEP = f"""
[sweep]
title = "Tiny, on a cluster"
seeds = [1, 2]
[[job]]
name = "number"
command = ["{{python}}", "-S", "{{here}}/write.py", "{{run}}/n.json", "7"]
[[cell]]
name = "run"
group = "runs"
run = "student.toml"
needs = ["number"]
overrides = {{ "train.steps" = {STEPS}, "train.evaluate_interval" = 0 }}
[[cell]]
name = "table {{n}}"
group = "tables"
vary = {{ n = [1, 2] }}
command = ["{{python}}", "-S", "{{here}}/write.py", "{{run}}/n.json", "{{n}}",
    "{{out}}/jobs/number/n.json"]
needs = ["number"]
[[metric]]
name = "n"
file = "n.json"
key = "n"
groups = ["tables"]
[[metric]]
name = "loss"
key = "ce_loss"
groups = ["runs"]
"""
# Adds the numbers of the other files. A cell that ran before its job would have none.
WRITE = """
import json, sys
total = int(sys.argv[2]) + sum(json.load(open(path))["n"] for path in sys.argv[3:])
json.dump({"n": total}, open(sys.argv[1], "w"))
"""


def submit(cluster: Cluster, path: Path, out: Path) -> list[str]:
    """Submit the sweep; return the numbers of the arrays."""
    command = [
        sys.executable,
        str(TOOL),
        str(path),
        "--output",
        str(out),
        "--slurm",
        "--sbatch-args",
        "--cpus-per-task=1",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, **cluster.environment},
    )
    assert done.returncode == 0, done.stderr
    return [line.split()[1] for line in done.stdout.splitlines() if line.startswith("level-")]


def check_results(out: Path) -> None:
    """Check that every cell has its numbers and every step of a run is there once."""
    result = read_result(out)
    assert not result.notes()
    assert [cell.samples["n"].values for cell in result.cells[1:]] == [
        {1: 8.0, 2: 8.0},
        {1: 9.0, 2: 9.0},
    ]
    for seed in (1, 2):
        steps = [
            row["step"]
            for row in whole_rows(out / f"runs/run/seed-{seed}/metrics.jsonl")
            if "split" not in row
        ]
        assert steps == list(range(1, STEPS + 1)), seed


def test_arrays_in_order_and_a_run_brought_back(tmp_path: Path) -> None:
    folder, out = tmp_path / "here", tmp_path / HOSTILE
    folder.mkdir()
    (folder / "write.py").write_text(WRITE)
    path = write_sweep(folder, SWEEP, tokens=write_tokens(tmp_path))
    with Cluster(tmp_path / "c") as cluster:
        first, second = submit(cluster, path, out)
        rows = out / "runs/run/seed-1/metrics.jsonl"
        cluster.wait(
            lambda: rows.exists() and len(whole_rows(rows)) > 20,
            "a run at work",
            tell=lambda: logs(out),
        )
        assert (out / "jobs/number/n.json").exists()
        assert cluster.state(first) == "COMPLETED"
        cluster.ask("scancel", "--signal=USR1", "--batch", f"{second}_1")
        finished = out / "runs/run/seed-1/status.json"
        cluster.wait(
            lambda: "requeue" in finished.read_text(), "the run left", tell=lambda: logs(out)
        )

        def all_ended() -> bool:
            cluster.hurry(f"{second}_1")
            return not cluster.ask("squeue", "--noheader", "--jobs", second)

        cluster.wait(
            all_ended,
            "all tasks ended",
            seconds=300,
            tell=lambda: cluster.ask("squeue") + logs(out),
        )
        assert submit(cluster, path, out) == [], "all is done"
    check_results(out)
    assert json.loads(finished.read_text())["state"] == "finished"
    assert [
        path
        for parent in (out, tmp_path, folder)
        for path in parent.iterdir()
        if path.name.startswith("sentinel")
    ] == []


def logs(out: Path) -> str:
    """Return the output of all tasks."""
    return "\n".join(
        f"{path.name}\n{path.read_text()}" for path in sorted((out / "slurm").glob("*.log"))
    )
