"""The sweeps of examples/ at toy size: text, teachers, caches, students, and the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_kd.sweep.plots.draw import pictures
from megatron_kd.sweep.results.sweep_results import read_result
from tests.helpers.program import ROOT
from tests.helpers.sweeps import sweep, tool

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

# 320 samples; a pass is 20 steps of 16.
TOY = {
    "text": ROOT / "megatron_kd",
    "pattern": "*.py",
    "vocabulary": 600,
    "train_tokens": 40961,
    "sequences": 8,
    "steps": 6,
    "warmup": 1,
}
TAUGHT = {"teacher_weak_short": 3, "teacher_equal_equal": 6}


def run_toy(name: str, out: Path, cells: list[str], **settings: Any) -> dict[str, Any]:
    """Run seed 1 of these cells; return the report's numbers by cell."""
    values = [
        word for key, value in (TOY | settings).items() for word in ("--set", f"{key}={value}")
    ]
    code, output = sweep(
        ROOT / f"examples/{name}/sweep.toml",
        out,
        "--jobs",
        "2",
        *values,
        "--only",
        *(f"{cell}, seed 1" for cell in cells),
    )
    assert code == 0, output
    assert "all done" in output, output
    code, output = tool(
        "report", str(out), "--html", str(out / "report.html"), "--json", str(out / "report.json")
    )
    assert code == 0, output
    assert (out / "report.html").stat().st_size > 50_000, output
    (report,) = json.loads((out / "report.json").read_text())
    return {cell["name"]: cell for cell in report["cells"]}


def test_design_space(tmp_path: Path) -> None:
    """One cell of each kind of teacher: none, cached, online, sampled, captured; token rules."""
    cells = ["LM", "KLD", "MSE", "PD* M", "NormKD", "WTTM", "AdaKD_H", "RS-12", "online late"]
    numbers_by_cell = run_toy(
        "design_space",
        tmp_path,
        cells,
        decay=1,
        teacher_steps=40,
        teacher_warmup=4,
        early_last=19,
        late_first=20,
    )
    names = ("held_out", "bits per byte", "ECE", "agreement", "prose", "other")
    numbers = {
        cell: [numbers_by_cell[cell]["metrics"][name]["mean"] for name in names] for cell in cells
    }
    assert all(math.isfinite(number) for row in numbers.values() for number in row)
    losses = [row[0] for row in numbers.values()]
    assert len(set(losses)) == len(losses), "no two of them are one run"
    assert all(3 < loss < math.log(600) + 0.5 for loss in losses), "no two of them are one run"
    assert numbers_by_cell["KLD"]["metrics"]["held_out"]["difference"]["n"] == 1
    assert numbers_by_cell["KLD"]["metrics"]["average"]["paper"] == 38.7
    assert numbers_by_cell["LM"]["metrics"]["ECE"]["paper"] == 0.003
    late = [
        json.loads(path.read_text())
        for path in (tmp_path / "jobs/online_late/targets").glob("step-*.json")
    ]
    assert sum(shard["records"] for shard in late) == 320
    assert min(shard["step"] for shard in late) == 20
    assert any("0 of 3 seeds" in note for note in read_result(tmp_path).notes()), (
        "what did not run is named"
    )


def test_weak_teachers(tmp_path: Path) -> None:
    """Teachers of two sizes and lengths, the grid, ablations, and a line for each teacher."""
    cells = [
        "no teacher",
        "weak_short alpha 0.2",
        "equal_equal alpha 1.0",
        "keep_kd alpha 0.8",
        "temperature 2.0 alpha 1.0",
    ]
    cells += ["hard label alpha 1.0", "top-20 alpha 1.0"]
    numbers_by_cell = run_toy("weak_teachers", tmp_path, cells, short=3, short_warmup=1)
    names = ("held_out", "perplexity", "prose perplexity", "other perplexity", "ECE")
    numbers = {
        cell: [numbers_by_cell[cell]["metrics"][name]["mean"] for name in names] for cell in cells
    }
    assert all(math.isfinite(number) for row in numbers.values() for number in row)
    losses = [row[0] for row in numbers.values()]
    assert len(set(losses)) == len(losses), "no two of them are one run"
    assert all(3 < loss < math.log(600) + 0.5 for loss in losses), "no two of them are one run"
    assert all(row[1] == pytest.approx(math.exp(row[0])) for row in numbers.values())
    lines = next(
        picture
        for picture in pictures(read_result(tmp_path))
        if picture.title == "In-domain: best alpha of each teacher"
    )
    assert {line.name: [point.x for point in line.points] for line in lines.series} == {
        "teacher = weak_short": [0.2],
        "teacher = equal_equal": [1.0],
    }
    lengths = {
        name: json.loads((tmp_path / f"jobs/{name}/status.json").read_text())["step"]
        for name in TAUGHT
    }
    assert lengths == TAUGHT, "each teacher to its own end"
