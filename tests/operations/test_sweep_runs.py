"""A sweep of two cells with two seeds of a tiny model: interrupted, measured, and reported."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from megatron_kd.sweep.results.sweep_results import read_result
from tests.helpers.sweeps import start_sweep, sweep, tool, write_sweep
from tests.helpers.tiny import write_tokens

SWEEP = """
[sweep]
title = "Tiny"
seeds = [1, 2]
baseline = "rate 0.001"
measure = [["{python}", "-S", "{here}/count.py", "{run}"]]
[[cell]]
name = "rate {rate}"
vary = { rate = [0.001, 0.01] }
run = "student.toml"
overrides = { "optimizer.learning_rate" = "{rate}" }
[[metric]]
name = "held-out"
split = "heldout"
key = "ce_loss"
better = "lower"
[[metric]]
name = "rows"
file = "count.json"
key = "rows"
[[plot]]
kind = "curve"
title = "Loss"
key = "ce_loss"
[[plot]]
kind = "lines"
title = "Rates"
metric = "held-out"
x = "rate"
"""
COUNT = """
import json, sys
rows = open(sys.argv[1] + "/metrics.jsonl").readlines()
json.dump({"rows": len(rows)}, open(sys.argv[1] + "/count.json", "w"))
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_sweep_of_runs(tmp_path: Path) -> None:
    folder, out = tmp_path / "here", tmp_path / "out"
    folder.mkdir()
    (folder / "count.py").write_text(COUNT)
    path = write_sweep(folder, SWEEP, tokens=write_tokens(tmp_path))
    # Interrupted while the first run trains: it saves, and the next start resumes it.
    first = start_sweep(path, out)
    deadline = time.monotonic() + 120
    rows = out / "runs/rate-0.001/seed-1/metrics.jsonl"
    while not (rows.exists() and rows.read_text()):
        assert time.monotonic() < deadline, first.communicate()
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    output = first.communicate(timeout=60)[1]
    assert first.returncode == 85, output
    assert "left to do" in output, output
    code, output = sweep(path, out, "--jobs", "2")
    assert code == 0, output
    assert "all done" in output, output
    for run in out.glob("runs/*/seed-*"):
        steps = [
            json.loads(line)["step"]
            for line in (run / "metrics.jsonl").read_text().splitlines()
            if "split" not in line
        ]
        assert steps == [1, 2, 3, 4, 5, 6]
        assert json.loads((run / "count.json").read_text()) == {"rows": 8}
    seeds = [read_result(out).cells[0].samples["held-out"].values[seed] for seed in (1, 2)]
    assert seeds[0] != seeds[1]
    assert all(3 < loss < 5 for loss in seeds)
    _again(path, out)
    code, output = tool("report", str(out), "--html", str(out / "report.html"))
    assert code == 0
    assert "rate 0.01 - rate" not in output
    assert "held-out - rate 0.001" in output
    assert (out / "report.html").stat().st_size > 20_000
    assert not read_result(out).notes()


def _again(path: Path, out: Path) -> None:
    """Repeat nothing; changed settings are refused; a finished run needs no record."""
    run = out / "runs/rate-0.01/seed-2"
    before = (run / "status.json").read_bytes()
    (run / "sweep/run.json").rename(run / "sweep/lost")
    code, output = sweep(path, out)
    assert code == 0, output
    assert "4 done before" in output, output
    assert (run / "status.json").read_bytes() == before, output
    student = path.parent / "student.toml"
    student.write_text(student.read_text().replace("warmup_steps = 2", "warmup_steps = 3"))
    code, output = sweep(path, out)
    assert code == 2, output
    assert "(optimizer.warmup_steps: 2 then, 3 now) (3 more are changed too)" in output, output
    assert output.count("\n") == 1, output
    student.write_text(student.read_text().replace("warmup_steps = 3", "warmup_steps = 2"))
    shutil.copy(out / "runs/rate-0.001/seed-1/config.toml", run / "config.toml")
    code, output = sweep(path, out, "--list")
    assert code == 0, output
    assert output.count("changed ") == 1, output
    assert output.count("done ") == 3, output
