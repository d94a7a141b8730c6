"""Continue prompts in every layout, with and without a key/value cache, and with the tool."""

from __future__ import annotations

import json

import pytest

from tests.helpers.tools import Done
from tests.inference.student import Student
from tests.inference.use_ranks import NEW_TOKENS

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]


def test_layouts_write_the_same_text(student: Student) -> None:
    results = student.results
    assert results.greedy["one"] == results.greedy["tp2"] == results.greedy["pp2"]
    assert results.sampled["one"] == results.sampled["tp2"] == results.sampled["pp2"]
    assert all(0 < len(tokens) <= NEW_TOKENS for tokens in results.tokens)


def test_batches_write_the_same_text(student: Student) -> None:
    results = student.results
    assert results.unbatched == results.sampled["one"] != results.greedy["one"]


def test_prompts_of_ids(student: Student) -> None:
    """Sample the same ids as from the texts, in every layout and batch."""
    results = student.results
    assert results.ids_of_ids == results.ids
    of_ids = results.ids_of_ids
    assert of_ids["one"] == of_ids["tp2"] == of_ids["pp2"]
    assert any(results.ids["one"])


def test_prompts_of_ids_that_cannot_be_continued(student: Student) -> None:
    phrases = ("prompt 1 must", "prompt 1 must", "stop strings")
    for phrase, refusal in zip(phrases, student.results.refusals, strict=True):
        assert phrase in refusal


def test_cache_changes_no_token(student: Student) -> None:
    assert student.results.tokens == student.results.uncached


def test_stop_string(student: Student, tool_calls: dict[str, Done]) -> None:
    (record,) = (json.loads(line) for line in tool_calls["stop"].out.splitlines())
    text = student.results.greedy["one"][0]
    assert record["finish"] == "stop"
    assert record["text"] == text[: text.index(text[8:12])]
