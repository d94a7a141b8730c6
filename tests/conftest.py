"""Collects what tests marked `fault(...)` found; `--fault-table FILE` writes it down (tests/helpers/faults.py)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.faults import CATALOGUE, Outcome, table

_REPORTS: list[pytest.TestReport] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fault-table", metavar="FILE", help="write what the tests of faults found, as Markdown"
    )
    parser.addoption(
        "--soak",
        metavar="MINUTES",
        default="1",
        help="how long tests/operations/test_soak.py disturbs runs",
    )


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Says for the table of faults what a test measured."""
    return lambda text: record_property("measured", text)


def numbers(item: pytest.Item) -> list[str]:
    """The faults a test is of; a number that the catalogue lacks is an error."""
    found = [str(number) for mark in item.iter_markers("fault") for number in mark.args]
    for number in found:
        if number not in CATALOGUE:
            raise pytest.UsageError(f"{item.nodeid}: no fault {number} in tests/helpers/faults.py")
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.user_properties.append(("faults", numbers(item)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _REPORTS.append(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--fault-table")
    if path is None:
        return
    outcomes: defaultdict[str, list[Outcome]] = defaultdict(list)
    for report in _REPORTS:
        said = dict(report.user_properties)
        for number in said["faults"]:
            outcomes[number].append(
                Outcome(
                    report.nodeid.removeprefix("tests/"),
                    report.outcome,
                    report.duration,
                    said.get("measured", ""),
                )
            )
    Path(path).write_text(table(outcomes), encoding="utf-8")
