"""The bigram sandbox from its sweep file to its page, with a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_kd.sweep.results.sweep_results import read_result
from tests.helpers.sweeps import ROOT, sweep, tool


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bigram_sandbox(tmp_path: Path) -> None:
    out = tmp_path / "out"
    cells = [
        "transformer plain",
        "transformer dpt90 routed imperfect",
        "tabular dpt90_routed imperfect",
    ]
    words = [
        "--small",
        "--jobs",
        "2",
        "--set",
        "steps=24",
        "--set",
        "sequences=800",
        "--set",
        "interval=12",
    ]
    code, output = sweep(ROOT / "examples/bigram_sandbox/sweep.toml", out, *words, "--only", *cells)
    assert code == 0, output
    cells_by_name = {cell.name: cell for cell in read_result(out).cells}
    for name in cells[:2]:
        samples = cells_by_name[name].samples
        assert all(
            samples[metric].n == 3
            for metric in ("high-entropy rows", "copied", "tokens until rows are learned")
        ), output
        assert 0 < (samples["copied"].mean or 0) < 0.5 < 1
    difference = cells_by_name[cells[1]].differences["high-entropy rows"]
    assert difference is not None
    assert difference.n == 3
    assert difference.mean != 0
    assert (cells_by_name[cells[2]].samples["low-entropy rows"].mean or 1) < (
        cells_by_name[cells[2]].samples["high-entropy rows"].mean or 0
    )
    code, output = tool("report", str(out), "--html", str(out / "report.html"))
    assert code == 0, output
    assert "transformer dpt90 routed imperfect" in output, output
    assert (out / "report.html").read_text().count("<svg") >= 4
