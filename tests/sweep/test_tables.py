"""Results and tables of a sweep, from results that are written down here."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import pytest

from megatron_kd.sweep.execution.task_state import write_json
from megatron_kd.sweep.pages.page import page
from megatron_kd.sweep.results.sweep_results import SeedValues, read_result
from megatron_kd.sweep.results.tables import as_json, decimals, format_sample, table
from tests.helpers.finished_sweep import EVIL, SWEEP, loss, write_finished_sweep
from tests.helpers.sweeps import tool

SEEDS = (1, 2, 3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_finished_sweep(tmp_path_factory.mktemp("results"))


def test_values_and_paired_differences(finished: Path) -> None:
    result = read_result(finished)
    assert [cell.name[:7] for cell in result.cells] == ["lm", "_ alpha", "_ alpha", "_ alpha"]
    assert result.notes() == []
    for number, cell in enumerate(result.cells):
        values = [loss(number, seed) for seed in SEEDS]
        sample = cell.samples["loss"]
        assert sample.mean == pytest.approx(statistics.fmean(values))
        assert sample.sd == pytest.approx(statistics.stdev(values))
        assert cell.samples["score"].values == {seed: number * 10.0 + seed for seed in SEEDS}
        difference = cell.differences["loss"]
        if number == 0:
            assert difference is None
            assert cell.paper == {}
            continue
        pairs = [loss(number, seed) - loss(0, seed) for seed in SEEDS]
        assert difference is not None
        assert difference.mean == pytest.approx(statistics.fmean(pairs))
        assert difference.sd == pytest.approx(statistics.stdev(pairs)), (
            "paired: the spread is that of the differences"
        )
    assert [cell.paper.get("loss") for cell in result.cells] == [None, 3.5, None, 2.5]


def test_table_and_json(finished: Path) -> None:
    result = read_result(finished)
    header, first, second = table(result)[:3]
    assert header == [
        "cell",
        "group",
        "seeds",
        "loss (nats)",
        "loss - lm",
        "loss, paper",
        "score",
        "score - lm",
    ]
    assert first[2:] == ["3", "4.020 ± 0.010", "-", "-", "2.0 ± 1.0", "-"]
    assert second[4] == "-0.480 ± 0.010"
    assert second[5] == "3.5"
    numbers = as_json(result)["cells"][1]["metrics"]["loss"]
    assert numbers["values"] == pytest.approx({str(seed): loss(1, seed) for seed in SEEDS})
    assert numbers["difference"]["n"] == 3
    assert numbers["paper"] == 3.5


def test_a_baseline_for_each_group(tmp_path: Path) -> None:
    """Cells are compared inside their group only; a group without a baseline is not compared."""
    names = f'["lm", "_ alpha 0.5 {EVIL}"]'
    text = SWEEP.replace('baseline = "lm"', f"baseline = {names}")
    result = read_result(write_finished_sweep(tmp_path, text))
    lm, zero, half, one = result.cells
    assert lm.differences["loss"] is None
    assert half.differences["loss"] is None
    for number, cell in ((1, zero), (3, one)):
        difference = cell.differences["loss"]
        assert difference is not None
        assert difference.values == pytest.approx(
            {seed: loss(number, seed) - loss(2, seed) for seed in SEEDS}
        )
    assert table(result)[0][4] == "loss - its group's baseline"
    assert "loss − its group&#x27;s baseline" in page([result])
    text = SWEEP.replace('baseline = "lm"', 'baseline = ["lm"]')
    lm_only = read_result(write_finished_sweep(tmp_path / "lm", text))
    assert not any(cell.differences["loss"] for cell in lm_only.cells)
    assert len(table(lm_only)[0]) == len(table(result)[0]) - 2


def test_a_metric_of_the_source_only(tmp_path: Path) -> None:
    """It has the source's figures in table and page, but no column of values and no note."""
    text = SWEEP.replace("paper = { loss", "paper = { average = 38.5, loss").split("[[plot]]")[0]
    metric = '[[metric]]\nname = "average"\nkey = "none"\nunit = "%"\ngroups = []\n'
    result = read_result(write_finished_sweep(tmp_path, text + metric))
    header, first, second = table(result)[:3]
    assert header[-2:] == ["score - lm", "average (%), paper"]
    assert first[-1] == "-"
    assert second[-1] == "38.5"
    assert not result.notes()
    document = page([result])
    assert re.search(r"average \(%\), paper", document)
    assert "average (%)<" not in document
    assert "average − lm" not in document
    (head, body) = re.search(
        r"<thead>(.*?)</thead>.*?<tbody>\s*(<tr>.*?</tr>)", document, flags=re.DOTALL
    ).groups()
    assert head.count("<th ") == body.count("<td") + body.count("<th "), (
        "a heading for every number"
    )


def test_missing_seeds_are_named(tmp_path: Path) -> None:
    """Unfinished, changed, unmeasured, damaged and not finite results do not count."""
    out = write_finished_sweep(tmp_path)
    runs = sorted(path for path in (out / "runs").iterdir() if path.name != "lm")
    write_json(out / "runs/lm/seed-1/status.json", {"state": "requeue"})
    (out / "runs/lm/seed-2/sweep/run.json").unlink()
    write_json(runs[0] / "seed-1/sweep/run.json", {"digest": "x"})
    (runs[0] / "seed-2/sweep/measure-1.json").unlink()
    write_json(runs[1] / "seed-1/evaluate.json", {"results": []})
    (runs[1] / "seed-2/metrics.jsonl").write_text(
        '{"step": 1, "split": "valid", "ce_loss": null}\n'
    )
    (runs[1] / "seed-3/evaluate.json").write_text("{")
    result = read_result(out)
    lm, one, two, _ = result.cells
    assert (
        lm.samples["loss"].n,
        one.samples["loss"].n,
        two.samples["loss"].n,
        two.samples["score"].n,
    ) == (1, 1, 2, 1)
    assert lm.samples["loss"].lacking == {1: "not finished", 2: "not finished"}
    assert one.lacking == {1: "run is of another definition", 2: "measure-1 not done"}
    assert two.samples["loss"].lacking == {2: "not finite"}
    assert two.samples["score"].values == {2: 22.0}
    assert one.differences["loss"] is not None
    assert one.differences["loss"].values == {3: pytest.approx(loss(1, 3) - loss(0, 3))}
    lines = table(result)
    assert lines[1][2] == "1 of 3"
    assert lines[1][3].endswith("(1 of 3)")
    assert lines[3][3].endswith("(2 of 3)")
    assert "±" not in lines[1][3]
    notes = "\n".join(result.notes())
    assert "lm: 1 of 3 seeds are complete (seed 1: not finished; seed 2" in notes
    assert "score: evaluate.json cannot be read" in notes
    code, output = tool("report", str(out))
    assert code == 0
    assert notes in output
    document = page([result])
    assert "Not complete" in document
    assert "measure-1 not done" in document
    (out / "sweep.json").write_text("{")
    assert tool("report", str(out))[0] == 2


def test_decimals() -> None:
    """Two digits of the spread; four digits in all without one."""
    for values, digits in (
        ({1: 4.0, 2: 4.001}, 5),
        ({1: 40.0, 2: 44.0}, 1),
        ({1: 5.0}, 3),
        ({1: 1234.0}, 0),
        ({}, 4),
        ({1: 0.02}, 5),
    ):
        assert decimals([SeedValues(dict(values), {})]) == digits, values
    sample = SeedValues({1: 0.5, 2: 0.25}, {3: "x"})
    assert format_sample(sample, 2, sign="+") == "+0.38 ± 0.18 (2 of 3)"
    assert format_sample(SeedValues({}, {1: "x"}), 2) == "-"
