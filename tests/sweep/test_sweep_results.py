"""Tables, pictures and the page of a sweep, from results that are written down here; the page in a real browser."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_kd.config import ConfigError
from megatron_kd.sweep.draw import svg
from megatron_kd.sweep.grid import resolve
from megatron_kd.sweep.page import page
from megatron_kd.sweep.plots import pictures
from megatron_kd.sweep.results import (
    Result,
    Sample,
    as_json,
    decimals,
    read_result,
    shown,
    table,
)
from megatron_kd.sweep.sweep_record import write_sweep as write_record
from megatron_kd.sweep.task_state import Folder, write_json
from tests.helpers.browser import Browser, missing
from tests.helpers.sweeps import tool, write_sweep

EVIL = "<img src=x onerror=alert(1)> & \\\"q' $x$"
SWEEP = f"""
[sweep]
title = "T <script>alert(1)</script>"
text = "One <b>line</b>.\\n\\nTwo."
seeds = [1, 2, 3]
baseline = "lm"
measure = [["true", "{{run}}"]]
[[cell]]
name = "lm"
run = "student.toml"
[[cell]]
name = "_ alpha {{alpha}} {EVIL}"
group = "alpha"
vary = {{ alpha = [0.0, 0.5, 1.0] }}
run = "student.toml"
overrides = {{ "distill.alpha" = "{{alpha}}" }}
paper = {{ loss = {{ "0.0" = 3.5, "1" = 2.5 }} }}
[[metric]]
name = "loss"
split = "valid"
key = "ce_loss"
unit = "nats"
better = "lower"
[[metric]]
name = "score"
file = "evaluate.json"
key = "results.0.score"
[[plot]]
kind = "curve"
title = "curve"
split = "valid"
key = "ce_loss"
x = "tokens"
[[plot]]
kind = "curve"
title = "long"
key = "ce_loss"
[[plot]]
kind = "bars"
title = "bars"
metric = "score"
[[plot]]
kind = "lines"
title = "lines"
metric = "loss"
x = "alpha"
[[plot]]
kind = "tradeoff"
title = "tradeoff"
x = "loss"
y = "score"
groups = ["alpha"]
[[plot]]
kind = "tradeoff"
title = "points"
file = "evaluate.json"
points = "points"
label = "t"
x = "x"
y = "y"
"""
STEPS = 250


def loss(cell: int, seed: int) -> float:
    return 4 - 0.5 * cell + 0.01 * seed * (cell + 1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a finished sweep leaves it."""
    folder = tmp_path_factory.mktemp("results")
    return fill(folder)


def fill(folder: Path, text: str = SWEEP) -> Path:
    sweep = resolve(write_sweep(folder / "here", text), folder / "out")
    write_record(sweep, {"commit": "c0ffee", "machine": "two <cores>"})
    for number, cell in enumerate(sweep.cells):
        for seed, task in cell.runs.items():
            run = sweep.out / task.folder
            for step in task.steps:
                content = {"digest": step.digest, "id": "1", "commit": "c0ffee", "machine": "m"}
                (run / "sweep").mkdir(parents=True, exist_ok=True)
                write_json(Folder(sweep.out).record(task, step), content)
            write_json(run / "status.json", {"state": "finished", "step": STEPS})
            rows: list[dict[str, Any]] = [
                {"step": s, "tokens": 10 * s, "ce_loss": 9 / s + loss(number, seed)}
                for s in range(1, STEPS + 1)
            ]
            rows += [
                {"step": s, "split": "valid", "ce_loss": loss(number, seed) + 1 - s / STEPS}
                for s in (125, STEPS)
            ]
            rows += [{"step": STEPS, "split": "other", "ce_loss": 0.0}]
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            points = [{"t": t, "x": 10 * t + seed, "y": number + t} for t in (0.5, 1.0)]
            write_json(
                run / "evaluate.json",
                {"results": [{"score": number * 10 + seed}], "points": points},
            )
    return sweep.out


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[[], Path]:
    """A folder of one's own."""
    return lambda: fill(tmp_path)


def test_numbers(finished: Path) -> None:
    result = read_result(finished)
    assert [row.name[:7] for row in result.rows] == [
        "lm",
        "_ alpha",
        "_ alpha",
        "_ alpha",
    ]
    assert result.notes() == []
    for number, row in enumerate(result.rows):
        values = [loss(number, seed) for seed in (1, 2, 3)]
        sample = row.samples["loss"]
        assert sample.mean == pytest.approx(statistics.fmean(values))
        assert sample.sd == pytest.approx(statistics.stdev(values))
        assert row.samples["score"].values == {seed: number * 10.0 + seed for seed in (1, 2, 3)}
        difference = row.differences["loss"]
        if number == 0:
            assert difference is None
            assert row.paper == {}
            continue
        pairs = [loss(number, seed) - loss(0, seed) for seed in (1, 2, 3)]
        assert difference is not None
        assert difference.mean == pytest.approx(statistics.fmean(pairs))
        assert difference.sd == pytest.approx(statistics.stdev(pairs)), (
            "paired: the spread is that of the differences"
        )
    assert [row.paper.get("loss") for row in result.rows] == [None, 3.5, None, 2.5]
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
    cell = as_json(result)["cells"][1]["metrics"]["loss"]
    assert cell["values"] == pytest.approx({str(seed): loss(1, seed) for seed in (1, 2, 3)})
    assert cell["difference"]["n"] == 3
    assert cell["paper"] == 3.5


def test_a_baseline_for_each_group(tmp_path: Path) -> None:
    """Cells of one kind are not subtracted from those of another; a group that has none is compared with nothing."""
    own = f'["lm", "_ alpha 0.5 {EVIL}"]'
    result = read_result(fill(tmp_path, SWEEP.replace('baseline = "lm"', f"baseline = {own}")))
    lm, zero, half, one = result.rows
    assert lm.differences["loss"] is None
    assert half.differences["loss"] is None
    for number, row in ((1, zero), (3, one)):
        difference = row.differences["loss"]
        assert difference is not None
        assert difference.values == pytest.approx(
            {s: loss(number, s) - loss(2, s) for s in (1, 2, 3)}
        )
    assert table(result)[0][4] == "loss - its group's baseline"
    assert "loss − its group&#x27;s baseline" in page([result])
    alone = read_result(
        fill(tmp_path / "alone", SWEEP.replace('baseline = "lm"', 'baseline = ["lm"]'))
    )
    assert not any(row.differences["loss"] for row in alone.rows)
    assert len(table(alone)[0]) == len(table(result)[0]) - 2


def test_a_metric_of_the_source_alone(tmp_path: Path) -> None:
    """No column of ours, no note that nothing was measured; its figures in the table and on the page."""
    text = SWEEP.replace("paper = { loss", "paper = { average = 38.5, loss")
    out = fill(
        tmp_path,
        text.split("[[plot]]")[0]
        + '[[metric]]\nname = "average"\nkey = "none"\nunit = "%"\ngroups = []\n',
    )
    result = read_result(out)
    header, first, second = table(result)[:3]
    assert header[-2:] == ["score - lm", "average (%), paper"]
    assert first[-1] == "-"
    assert second[-1] == "38.5"
    assert not result.notes()
    shown = page([result])
    assert re.search(r"average \(%\), paper", shown)
    assert "average (%)<" not in shown
    assert "average − lm" not in shown
    (head, body) = re.search(
        r"<thead>(.*?)</thead>.*?<tbody>\s*(<tr>.*?</tr>)", shown, flags=re.DOTALL
    ).groups()
    assert head.count("<th ") == body.count("<td") + body.count("<th "), (
        "a heading for every number"
    )


def test_what_lacks_seeds_is_told(damaged: Callable[[], Path]) -> None:
    """Half-done, of another definition, not measured, without the number, not finite: none counts, and each is named."""
    out = damaged()
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
    lm, one, two, _ = result.rows
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
    rows = table(result)
    assert rows[1][2] == "1 of 3"
    assert rows[1][3].endswith("(1 of 3)")
    assert rows[3][3].endswith("(2 of 3)")
    assert "±" not in rows[1][3]
    notes = "\n".join(result.notes())
    assert "lm: 1 of 3 seeds are complete (seed 1: not finished; seed 2" in notes
    assert "score: evaluate.json cannot be read" in notes
    code, told = tool("report", str(out))
    assert code == 0
    assert notes in told
    text = page([result])
    assert "Not complete" in text
    assert "measure-1 not done" in text
    (out / "sweep.json").write_text("{")
    assert tool("report", str(out))[0] == 2


def test_what_the_pictures_show(finished: Path) -> None:
    result = read_result(finished)
    curve, long, bars, lines, tradeoff, points = pictures(result)
    assert [(point.x, round(point.y, 6)) for point in curve.series[0].points] == [
        (1250.0, 4.52),
        (2500.0, 4.02),
    ]
    assert curve.series[1].points[1].y_sd == pytest.approx(0.02)
    assert "3 seeds" in curve.series[0].points[0].text
    first = long.series[0].points
    assert len(first) == 200
    assert first[-1].x == STEPS
    assert first[0].y == pytest.approx(statistics.fmean([9, 4.5]) + 4.02)
    assert [series.points[0].x for series in bars.series] == [2.0, 12.0, 22.0, 32.0]
    (line,) = lines.series
    assert [point.x for point in line.points] == [0.0, 0.5, 1.0]
    assert [point.y for point in line.paper] == [3.5, 2.5]
    assert len(tradeoff.series) == 3
    assert tradeoff.series[0].points[0].x_sd == pytest.approx(0.02)
    assert [(point.x, point.y) for point in points.series[2].points] == [(7.0, 2.5), (12.0, 3.0)]
    assert "t 0.5" in points.series[0].points[0].text
    assert points.series[0].points[0].x_sd == 1.0
    drawn = svg(lines, "n")
    assert "the paper's figure" in drawn
    assert "alpha" in drawn
    assert drawn.count("<title>") == 5


def test_digits() -> None:
    """Two of the spread; four in all without one."""
    for values, digits in (
        ({1: 4.0, 2: 4.001}, 5),
        ({1: 40.0, 2: 44.0}, 1),
        ({1: 5.0}, 3),
        ({1: 1234.0}, 0),
        ({}, 4),
        ({1: 0.02}, 5),
    ):
        assert decimals([Sample(dict(values), {})]) == digits, values
    assert shown(Sample({1: 0.5, 2: 0.25}, {3: "x"}), 2, sign="+") == "+0.38 ± 0.18 (2 of 3)"
    assert shown(Sample({}, {1: "x"}), 2) == "-"


def test_report_writes_everything(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--html", str(tmp_path / "a/r.html"), "--json", str(tmp_path / "r.json"), "--markdown"]
    code, told = tool("report", str(finished), str(finished), *words)
    assert code == 0, told
    assert told.count("| lm ") == 2, told
    assert tool("report", str(finished), "--pictures", str(tmp_path / "p"))[0] == 0
    assert len(list((tmp_path / "p").glob("*.png"))) == 6
    assert len(json.loads((tmp_path / "r.json").read_text())) == 2
    text = (tmp_path / "a/r.html").read_text()
    assert not re.search(r"https?:|<script>alert|<img|<b>line", text)
    assert text.count("<svg") == 12
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids)) > 50, "two pictures share an id"
    assert {found for found in re.findall(r'(?:href="#|url\(#)([^")]+)', text)} <= set(ids)
    for bad, sentence in (
        (["--output", "x.png"], "--output are for runs"),
        ([str(tmp_path)], "one after the other"),
    ):
        code, told = tool("report", str(finished), *bad)
        assert code == 2
        assert sentence in told
        assert told.count("\n") == 1
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, told = tool("report", str(finished), "--html", str(tmp_path / "no.html"))
    assert code == 2
    assert "pip install 'megatron-kd[report]'" in told
    assert not (tmp_path / "no.html").exists()
    assert tool("report", str(finished))[0] == 0, "the table needs no matplotlib"
    with pytest.raises(ConfigError, match=r"sweep\.json does not exist"):
        read_result(tmp_path)


@pytest.mark.skipif(bool(missing()), reason=missing() or "-")
def test_page_in_a_browser(finished: Path, tmp_path: Path) -> None:
    """From a disk: no error, no request but for itself; pictures that can be seen and say their numbers; tables that sort; both schemes."""
    result: Result = read_result(finished)
    path = tmp_path / "page $ x.html"
    path.write_text(page([result]), encoding="utf-8")
    lightness = []
    for dark, width in ((False, 1200), (True, 400)):
        with Browser(tmp_path / f"profile{width}", dark=dark, width=width) as browser:
            browser.open(path.as_uri())
            assert browser.messages() == []
            assert browser.requests() == [path.as_uri()]
            boxes = browser.run(
                "return [...document.querySelectorAll('svg')].map(s => [s.getBoundingClientRect().width, s.getAttribute('aria-label')])"
            )
            assert len(boxes) == 6, boxes
            assert all(wide > 300 and len(alt) > 40 for wide, alt in boxes), boxes
            assert browser.run(
                "return document.documentElement.scrollWidth <= window.innerWidth"
            ), "the page itself is as wide as the window"
            assert browser.run("return document.images.length") == 0
            assert EVIL.replace("\\", "") in browser.run("return document.body.innerText")
            marks = browser.run(
                "return [...document.querySelectorAll('.point')].map(p => [p.querySelector('title').textContent, p.getBBox().width])"
            )
            assert len(marks) > 60, marks
            assert all(text and wide > 0 for text, wide in marks), marks
            lightness.append(browser.run("return getComputedStyle(document.body).backgroundColor"))
            column = ("tbody tr", "e.cells[3].textContent")
            before = browser.each(*column)
            browser.click("thead button", 3)
            assert browser.each(*column) == sorted(before) != before
            browser.click("thead button", 3)
            assert browser.each(*column) == sorted(before, reverse=True)
            browser.click("thead button", 5)
            papers = browser.each("tbody tr", "e.cells[5].textContent")
            assert papers == ["2.5", "3.5", "-", "-"], "missing numbers come last"
            assert (
                browser.run("return document.querySelectorAll('th')[5].getAttribute('aria-sort')")
                == "ascending"
            )
            assert browser.messages() == []
            assert browser.requests() == []
    assert lightness == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"]
