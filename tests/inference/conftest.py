"""Share one trained student, and the results of all tool calls, between the tests of inference."""

from __future__ import annotations

import pytest

from tests.helpers.tools import Done, run_tools
from tests.inference.student import INVALID_CALLS, Student, valid_calls


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    return Student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def tool_calls(student: Student) -> dict[str, Done]:
    """Make every call of a tool in one process."""
    invalid = {name: call for name, (call, _) in INVALID_CALLS.items()}
    return run_tools({**valid_calls(student), **invalid}, cwd=student.folder)
