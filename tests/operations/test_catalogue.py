"""The catalogue of faults: a test injects each of them, and the table has its outcome."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.helpers.faults import CATALOGUE, FaultOutcome, table

TESTS = Path(__file__).parents[1]


def marked(tree: ast.AST) -> set[str]:
    """Arguments of every `pytest.mark.fault(...)`."""
    return {
        str(argument.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "fault"
        for argument in node.args
        if isinstance(argument, ast.Constant)
    }


def test_every_fault_is_injected() -> None:
    injected = set().union(
        *(marked(ast.parse(path.read_text(encoding="utf-8"))) for path in TESTS.rglob("test_*.py"))
    )
    assert set(CATALOGUE) - injected == set()
    assert injected - set(CATALOGUE) == set()


def test_the_table() -> None:
    text = table(
        {
            "1": [
                FaultOutcome("a.py::x[1]", "passed", 1.0, "5 kills, 0 lost"),
                FaultOutcome("a.py::x[2]", "passed", 1.0, "5 kills, 0 lost"),
            ],
            "2": [
                FaultOutcome("a.py::y", "passed", 1.0, ""),
                FaultOutcome("a.py::z", "failed", 1.0, ""),
            ],
            "4": [FaultOutcome("a.py::w", "skipped", 0.0, "")],
        }
    )
    lines = {
        line.split(" | ")[0].strip("| "): line
        for line in text.splitlines()
        if line.startswith("| ")
    }
    assert lines["1"].endswith("| stood | 5 kills, 0 lost; 2 of 2 cases, 2 s | `a.py::x` |")
    assert "| FAILED |" in lines["2"]
    assert "| not run |" in lines["3"]
    assert "| skipped |" in lines["4"]
    assert set(CATALOGUE) <= set(lines)


def test_the_kept_table_names_tests_that_exist() -> None:
    kept = (TESTS / "operations/FAULTS.md").read_text(encoding="utf-8")
    for name, test in set(re.findall(r"`([\w/]+\.py)::(\w+)`", kept)):
        assert f"def {test}(" in (TESTS / name).read_text(encoding="utf-8"), f"{name}::{test}"
