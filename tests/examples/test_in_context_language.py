"""Test the documents of the in-context example: copies, needles, and sums with their solutions."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from typing import Any

import numpy as np
import pytest

from megatron_kd.config import load_config
from tests.examples.in_context import FOLDER, RIGHT_SOLUTIONS, WORDS, language, read_terms
from tests.losses.cases import fresh_seed


@pytest.fixture
def rng() -> Any:
    """Return a generator with a fresh seed."""
    return np.random.default_rng(fresh_seed())


def test_words_are_those_of_the_run_file() -> None:
    config = load_config(["--config", str(FOLDER / "student.toml")])
    assert len(set(WORDS)) == len(WORDS) == config.model.vocab_size


def test_copies_come_again_at_their_distance(rng: Any) -> None:
    for _ in range(200):
        copy = language.draw_copy(rng)
        segment = copy.words[copy.start :]
        assert copy.words[copy.start - 1] == "<again>"
        assert len(set(segment)) == len(segment) >= 4
        first = copy.start - copy.distance
        assert copy.words[first : first + len(segment)] == segment
        assert copy.words[0] == "<copy>"
    copy = language.draw_copy(rng, length=5, gap=7)
    assert copy.distance == 13
    assert len(copy.words) == 1 + 5 + 7 + 1 + 5


@pytest.mark.parametrize("depth", [None, 0.0, 0.5, 1.0])
def test_needles_have_one_answer(rng: Any, depth: float | None) -> None:
    for _ in range(50):
        needle = language.draw_needle(rng, depth=depth)
        body = needle.body[1:]
        pairs = {word: body[index + 1] for index, word in enumerate(body) if word in language.KEYS}
        assert sum(word in language.KEYS for word in body) == len(pairs), "a key occurs twice"
        assert len(body) == needle.context
        first_key = needle.answers[0][0]
        assert needle.prompt == [*needle.body, "?", first_key, ":"]
        questions = [
            needle.words[len(needle.body) + 4 * number + 1] for number in range(len(needle.answers))
        ]
        assert [(key, pairs[key]) for key in questions] == needle.answers
        assert len(set(questions)) == len(questions)
        # The last possible position leaves room for the value.
        position, last = body.index(first_key), len(body) - 2
        if depth is not None:
            assert abs(position / last - depth) < 0.35
            assert depth != 0.0 or position == 0
            assert depth != 1.0 or position == last


def test_solutions_of_sums(rng: Any) -> None:
    """Check the answer against the text, and every step as an equation."""
    for _ in range(300):
        problem = language.draw_problem(rng)
        words = language.draw_solution(rng, problem, RIGHT_SOLUTIONS)
        assert sum(read_terms(problem.prompt)) == sum(problem.terms) == int(words[-1])
        assert language.is_right(problem.terms, words)
        for start in range(0, len(words) - 2, 6):
            left, sign, right, _, result, _ = words[start : start + 6]
            assert int(left) + (int(right) if sign == "+" else -int(right)) == int(result) >= 0


def test_every_order_of_a_sum_occurs(rng: Any) -> None:
    clauses = (("p0", 5, "t0"), ("p1", 9, "t1"), ("p2", -3, "t0"), ("p3", 4, "t0"))
    problem = language.Problem(clauses, "t0")
    assert set(language.valid_orders(problem.terms)) == {
        order for order in permutations((5, -3, 4)) if order[0] > 0
    }
    solutions = {tuple(language.draw_solution(rng, problem, RIGHT_SOLUTIONS)) for _ in range(100)}
    assert len(solutions) == 4
    assert all(language.is_right(problem.terms, words) for words in solutions)


def test_shares_of_bad_solutions(rng: Any) -> None:
    noise, counts = language.Noise(0.3, 0.2), Counter[str]()
    for _ in range(2000):
        problem = language.draw_problem(rng)
        words = language.draw_solution(rng, problem, noise)
        if "answer" not in words:
            counts["incomplete"] += 1
        elif not language.is_right(problem.terms, words):
            counts["wrong"] += 1
        else:
            counts["right"] += 1
    for kind, share in (("wrong", 0.3), ("incomplete", 0.2), ("right", 0.5)):
        assert abs(counts[kind] / 2000 - share) < 0.06, (kind, counts)
    with pytest.raises(ValueError, match="together at most 1"):
        language.Noise(0.7, 0.4)


@pytest.mark.parametrize(
    ("words", "right"),
    [
        ("5 + 4 = 9 ; 9 - 3 = 6 ; answer 6", True),
        ("4 - 3 = 1 ; 1 + 5 = 6 ; answer 6", True),
        ("answer 6", False),
        ("5 + 4 = 9 ; answer 6", False),
        ("5 + 4 = 8 ; 8 - 3 = 6 ; answer 6", False),
        ("5 + 4 = 9 ; 9 - 3 = 6 ; answer 5", False),
        ("5 + 4 = 9 ; 9 - 3 = 6 ; answer", False),
        ("5 + 4 = 9 ; 9 - 3 = 6 ; answer 6 answer 6", False),
        ("5 + 5 = 10 ; 10 - 4 = 6 ; answer 6", False),
        ("5 + 1 = 6 ; answer 6", False),
        ("", False),
    ],
)
def test_right_solutions(words: str, right: bool) -> None:
    assert language.is_right([5, -3, 4], words.split()) is right
