"""Check that each tool reports bad input in one sentence, with exit code 2."""

from __future__ import annotations

import pytest

from tests.helpers.tools import Done
from tests.inference.student import INVALID_CALLS

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]


@pytest.mark.parametrize("name", INVALID_CALLS)
def test_bad_input_is_one_sentence(tool_calls: dict[str, Done], name: str) -> None:
    done = tool_calls[name]
    assert done.code == 2, done
    assert INVALID_CALLS[name][1] in done.err, done
    assert len(done.err.splitlines()) == 1, done
