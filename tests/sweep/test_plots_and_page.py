"""Plots and the page of a sweep, from results that are written down here; the page in a browser."""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path

import pytest

from megatron_kd.config import ConfigError
from megatron_kd.sweep.pages.page import page
from megatron_kd.sweep.plots.draw import pictures, svg
from megatron_kd.sweep.plots.kinds import PLOT_KINDS
from megatron_kd.sweep.results.sweep_results import SweepResult, read_result
from tests.helpers.browser import Browser, missing
from tests.helpers.finished_sweep import EVIL, STEPS, write_finished_sweep
from tests.helpers.sweeps import tool


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_finished_sweep(tmp_path_factory.mktemp("results"))


def test_content_of_the_plots(finished: Path) -> None:
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
    drawing = svg(lines, "n")
    assert "the paper's figure" in drawing
    assert "alpha" in drawing
    assert drawing.count("<title>") == 5


def test_every_kind_of_plot_is_registered_by_its_module() -> None:
    folder = Path(sys.modules["megatron_kd.sweep.plots.kinds"].__file__ or "").parent
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert PLOT_KINDS.keys() == modules


def test_report_writes_everything(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--html", str(tmp_path / "a/r.html"), "--json", str(tmp_path / "r.json"), "--markdown"]
    code, output = tool("report", str(finished), str(finished), *words)
    assert code == 0, output
    assert output.count("| lm ") == 2, output
    assert tool("report", str(finished), "--pictures", str(tmp_path / "p"))[0] == 0
    assert len(list((tmp_path / "p").glob("*.png"))) == 6
    assert len(json.loads((tmp_path / "r.json").read_text())) == 2
    document = (tmp_path / "a/r.html").read_text()
    assert not re.search(r"https?:|<script>alert|<img|<b>line", document)
    assert document.count("<svg") == 12
    ids = re.findall(r'\bid="([^"]*)"', document)
    assert len(ids) == len(set(ids)) > 50, "two pictures share an id"
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', document)) <= set(ids)
    for arguments, sentence in (
        (["--output", "x.png"], "--output are for runs"),
        ([str(tmp_path)], "one after the other"),
    ):
        code, output = tool("report", str(finished), *arguments)
        assert code == 2
        assert sentence in output
        assert output.count("\n") == 1
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, output = tool("report", str(finished), "--html", str(tmp_path / "no.html"))
    assert code == 2
    assert "pip install 'megatron-kd[report]'" in output
    assert not (tmp_path / "no.html").exists()
    assert tool("report", str(finished))[0] == 0, "the table needs no matplotlib"
    with pytest.raises(ConfigError, match=r"sweep\.json does not exist"):
        read_result(tmp_path)


@pytest.mark.skipif(bool(missing()), reason=missing() or "-")
def test_page_in_a_browser(finished: Path, tmp_path: Path) -> None:
    """From a disk: no error, no other request, visible plots with tooltips, sortable tables."""
    result: SweepResult = read_result(finished)
    path = tmp_path / "page $ x.html"
    path.write_text(page([result]), encoding="utf-8")
    backgrounds = []
    for dark, width in ((False, 1200), (True, 400)):
        with Browser(tmp_path / f"profile{width}", dark=dark, width=width) as browser:
            browser.open(path.as_uri())
            assert browser.messages() == []
            assert browser.requests() == [path.as_uri()]
            _check_plots(browser)
            backgrounds.append(
                browser.run("return getComputedStyle(document.body).backgroundColor")
            )
            _check_sorting(browser)
            assert browser.messages() == []
            assert browser.requests() == []
    assert backgrounds == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"]


def _check_plots(browser: Browser) -> None:
    boxes = browser.run(
        "return [...document.querySelectorAll('svg')]"
        ".map(s => [s.getBoundingClientRect().width, s.getAttribute('aria-label')])"
    )
    assert len(boxes) == 6, boxes
    assert all(width > 300 and len(label) > 40 for width, label in boxes), boxes
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth"), (
        "the page itself is as wide as the window"
    )
    assert browser.run("return document.images.length") == 0
    assert EVIL.replace("\\", "") in browser.run("return document.body.innerText")
    marks = browser.run(
        "return [...document.querySelectorAll('.point')]"
        ".map(p => [p.querySelector('title').textContent, p.getBBox().width])"
    )
    assert len(marks) > 60, marks
    assert all(text and width > 0 for text, width in marks), marks


def _check_sorting(browser: Browser) -> None:
    column = ("tbody tr", "e.cells[3].textContent")
    unsorted = browser.evaluate_all(*column)
    browser.click("thead button", 3)
    assert browser.evaluate_all(*column) == sorted(unsorted) != unsorted
    browser.click("thead button", 3)
    assert browser.evaluate_all(*column) == sorted(unsorted, reverse=True)
    browser.click("thead button", 5)
    papers = browser.evaluate_all("tbody tr", "e.cells[5].textContent")
    assert papers == ["2.5", "3.5", "-", "-"], "missing numbers come last"
    assert (
        browser.run("return document.querySelectorAll('th')[5].getAttribute('aria-sort')")
        == "ascending"
    )
