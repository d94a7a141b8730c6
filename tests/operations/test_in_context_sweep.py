"""The in-context sweep from data to page, with models too small to learn anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_kd.sweep.results.sweep_results import read_result
from tests.helpers.program import ROOT
from tests.helpers.sweeps import sweep, tool

TOY = {
    "steps": 8, "steps_2x": 16, "teacher_steps": 8, "sequences": 128, "interval": 4,
    "heldout": 4, "problems": 3, "each": 1, "samples": 16, "warmup": 1, "width": 16, "inner": 32,
    "teacher_width": 32, "teacher_inner": 64,
}  # fmt: skip
CELLS = ["SPT", "DPT-50", "DPT-90", "DPT-90, 15 % routed", "DPT-90, 30 % routed", "SPT-2x"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_sweep_from_data_to_page(tmp_path: Path) -> None:
    folder, out = tmp_path / "in_context", tmp_path / "out"
    shutil.copytree(ROOT / "examples/in_context", folder)
    text = (folder / "sweep.toml").read_text()
    assert "\nseeds = [1, 2, 3]\n" in text
    (folder / "sweep.toml").write_text(text.replace("\nseeds = [1, 2, 3]\n", "\nseeds = [1]\n"))
    settings = [word for name, value in TOY.items() for word in ("--set", f"{name}={value}")]
    code, output = sweep(folder / "sweep.toml", out, "--small", "--jobs", "2", *settings)
    assert code == 0, output
    assert "all done" in output, output
    result = read_result(out)
    assert not result.notes()
    assert [cell.name for cell in result.cells] == CELLS
    for cell in result.cells:
        assert all(sample.n == 1 for sample in cell.samples.values()), cell
        assert cell.samples["copied"].values[1] < 1.0
        assert 0.0 <= cell.samples["pass@16, best"].values[1] <= 1.0
        lines = [
            json.loads(line)
            for line in (cell.folders[1] / "metrics.jsonl").read_text().splitlines()
        ]
        last = [line for line in lines if "split" not in line][-1]
        assert last["step"] == 8 * (1 + (cell.name == "SPT-2x"))
        assert (last["kd_loss"] is None) == cell.name.startswith("SPT")
        if cell.name.startswith("DPT"):
            routed = cell.values["routed"]
            assert last["alpha"] == cell.values["alpha"]
            assert (last["routed_share"] is None) == (routed == 0.0)
            assert not routed or routed <= last["routed_share"] < routed + 0.1
        points = json.loads((cell.folders[1] / "probe.json").read_text())["sum"]["points"]
        assert [point["temperature"] for point in points] == [0.2, 0.4, 0.6, 0.8, 1.0]
        assert len(points[0]["pass"]) == 16
    assert json.loads((out / "jobs/teacher_probe/probe.json").read_text())["step"] == 8
    code, output = tool(
        "report", str(out), "--html", str(out / "report.html"), "--pictures", str(out / "pictures")
    )
    assert code == 0, output
    assert "SPT-2x" in output, output
    assert "pass@16" in output, output
    assert len(list((out / "pictures").iterdir())) >= 8
    assert (out / "report.html").stat().st_size > 50_000
