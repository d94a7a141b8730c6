"""Collect the outcomes of tests marked `fault(...)`; --fault-table FILE writes them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.faults import CATALOGUE, FaultOutcome, table

_REPORTS: list[pytest.TestReport] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fault-table",
        metavar="FILE",
        help="write the outcomes of the tests of faults, as Markdown",
    )
    parser.addoption(
        "--soak",
        metavar="MINUTES",
        default="1",
        help="how long tests/operations/test_soak.py disturbs runs",
    )


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Return a function that reports a measurement for the table of faults."""
    return lambda text: record_property("measured", text)


def numbers(item: pytest.Item) -> list[str]:
    """Return the faults that a test injects; a number outside the catalogue is an error."""
    fault_numbers = [str(number) for mark in item.iter_markers("fault") for number in mark.args]
    for number in fault_numbers:
        if number not in CATALOGUE:
            raise pytest.UsageError(f"{item.nodeid}: no fault {number} in tests/helpers/faults.py")
    return fault_numbers


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
    outcomes: defaultdict[str, list[FaultOutcome]] = defaultdict(list)
    for report in _REPORTS:
        properties = dict(report.user_properties)
        for number in properties["faults"]:
            outcomes[number].append(
                FaultOutcome(
                    report.nodeid.removeprefix("tests/"),
                    report.outcome,
                    report.duration,
                    properties.get("measured", ""),
                )
            )
    Path(path).write_text(table(outcomes), encoding="utf-8")
