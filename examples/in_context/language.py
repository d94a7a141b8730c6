"""Generate documents of a small language whose every answer can be computed.

There are three kinds of documents. In a copy, a segment comes again some tokens later:
    <copy> s3 s17 s9 .. o3 o1 .. <again> s3 s17 s9 .. <end>
In a needle, pairs of key and value stand in filler, and some of them are asked for:
    <find> o3 k4 v9 o1 o1 k7 v2 o5 ? k7 : v2 ? k4 : v9 <end>
In a sum, amounts of one thing are added, with steps:
    <sum> p1 finds 3 t0 p4 finds 5 t2 p2 finds 4 t0 ? t0 : 4 + 3 = 7 ; answer 7 <end>

The terms of a sum may be added in any order that never goes below zero, so that a problem has
several right solutions. In training documents some solutions have a wrong step and go on from its
result, and some stop without an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

Rng = np.random.Generator

END, COPY, AGAIN, FIND, SUM = "<end>", "<copy>", "<again>", "<find>", "<sum>"
SYMBOLS = tuple(f"s{n}" for n in range(24))
FILLERS = tuple(f"o{n}" for n in range(8))
KEYS, VALUES = tuple(f"k{n}" for n in range(12)), tuple(f"v{n}" for n in range(12))
PERSONS, THINGS = tuple(f"p{n}" for n in range(8)), tuple(f"t{n}" for n in range(4))
MAX_TERMS, MAX_AMOUNT = 4, 9
NUMBERS = tuple(str(n) for n in range(MAX_TERMS * MAX_AMOUNT + 1))
WORDS = (END, COPY, AGAIN, FIND, SUM, "?", ":", ";", "+", "-", "=", "answer", "finds", "loses",
         *SYMBOLS, *FILLERS, *KEYS, *VALUES, *PERSONS, *THINGS, *NUMBERS)  # fmt: skip
IDS = {word: number for number, word in enumerate(WORDS)}
# Gaps are short and questions are many: with less to find in a sequence, models of this size had
# not begun to copy after 2,000 steps.
SEGMENT, GAP, CONTEXT, PAIRS = (8, 20), (0, 24), (24, 64), (4, 10)


def encode(words: Sequence[str]) -> list[int]:
    """Return the ids of words."""
    return [IDS[word] for word in words]


def _draw_words(rng: Rng, words: Sequence[str], count: int) -> list[str]:
    return [words[index] for index in rng.integers(0, len(words), count)]


def _draw_distinct(rng: Rng, words: Sequence[str], count: int) -> list[str]:
    return [words[index] for index in rng.permutation(len(words))[:count]]


def _draw_integer(rng: Rng, bounds: tuple[int, int]) -> int:
    return int(rng.integers(bounds[0], bounds[1] + 1))


@dataclass(frozen=True)
class Copy:
    """Hold a copy document.

    Attributes:
        words: The document without its end.
        start: Position of the first repeated word.
        distance: Words between the two occurrences of a repeated word.
    """

    words: list[str]
    start: int
    distance: int


def draw_copy(rng: Rng, *, length: int | None = None, gap: int | None = None) -> Copy:
    """Return a segment of different symbols, `gap` fillers, and the segment again.

    Args:
        rng: Generator of the document.
        length: Symbols of the segment; drawn from SEGMENT if None.
        gap: Number of fillers; drawn from GAP if None.
    """
    length = _draw_integer(rng, SEGMENT) if length is None else length
    gap = _draw_integer(rng, GAP) if gap is None else gap
    segment = _draw_distinct(rng, SYMBOLS, length)
    words = [COPY, *segment, *_draw_words(rng, FILLERS, gap), AGAIN, *segment]
    return Copy(words, length + gap + 2, length + gap + 1)


@dataclass(frozen=True)
class Needle:
    """Hold a needle document.

    Attributes:
        body: The document up to its first question.
        answers: (key, value) in the order of the questions.
        depth: Position of the first of these pairs in the context: 0 beginning, 1 end.
        context: Words of the context.
    """

    body: list[str]
    answers: list[tuple[str, str]]
    depth: float
    context: int

    @property
    def prompt(self) -> list[str]:
        """Return the document up to its first answer."""
        return [*self.body, "?", self.answers[0][0], ":"]

    @property
    def words(self) -> list[str]:
        """Return the document without its end."""
        questions = (word for key, value in self.answers for word in ("?", key, ":", value))
        return [*self.body, *questions]


def draw_needle(
    rng: Rng, *, context: int | None = None, pairs: int | None = None, depth: float | None = None
) -> Needle:
    """Return pairs of key and value at random positions, and questions for 1 to all of them.

    Args:
        rng: Generator of the document.
        context: Words of the context; drawn from CONTEXT if None.
        pairs: Number of pairs; drawn from PAIRS if None.
        depth: Position of the first requested pair in [0, 1]; drawn if None.
    """
    context = _draw_integer(rng, CONTEXT) if context is None else context
    pairs = _draw_integer(rng, PAIRS) if pairs is None else pairs
    keys, values = _draw_distinct(rng, KEYS, pairs), _draw_words(rng, VALUES, pairs)
    # A pair takes one slot among fillers, so that no two overlap.
    slots = context - pairs
    first_slot = int(rng.integers(slots)) if depth is None else round(depth * (slots - 1))
    other_slots = [slot for slot in rng.permutation(slots) if slot != first_slot][: pairs - 1]
    pair_of_slot = dict(
        zip([first_slot, *other_slots], zip(keys, values, strict=True), strict=True)
    )
    body = [
        word
        for slot, filler in enumerate(_draw_words(rng, FILLERS, slots))
        for word in pair_of_slot.get(slot, (filler,))
    ]
    answers = list(zip(keys, values, strict=True))[: _draw_integer(rng, (1, pairs))]
    return Needle([FIND, *body], answers, first_slot / max(slots - 1, 1), context)


@dataclass(frozen=True)
class Problem:
    """Hold a sum without its solution.

    Attributes:
        clauses: (person, signed amount, thing).
        question: The thing whose amounts are added.
    """

    clauses: tuple[tuple[str, int, str], ...]
    question: str

    @property
    def terms(self) -> list[int]:
        """Return the signed amounts of the thing in question, in the order of the text."""
        return [amount for _, amount, thing in self.clauses if thing == self.question]

    @property
    def prompt(self) -> list[str]:
        """Return the document up to its solution."""
        text = [
            word
            for person, amount, thing in self.clauses
            for word in (person, "finds" if amount > 0 else "loses", str(abs(amount)), thing)
        ]
        return [SUM, *text, "?", self.question, ":"]


def draw_problem(rng: Rng, *, min_terms: int = 2) -> Problem:
    """Return a sum of `min_terms` to MAX_TERMS amounts of one thing, which is not below zero.

    Up to two amounts of other things stand between them.
    """
    question, *other_things = _draw_distinct(rng, THINGS, 3)
    count = _draw_integer(rng, (min_terms, MAX_TERMS))
    while True:
        amounts = [
            int(value)
            for value in rng.integers(1, MAX_AMOUNT + 1, count) * rng.choice([1, 1, -1], count)
        ]
        if sum(amounts) >= 0 and max(amounts) > 0:
            break
    clauses = [(question, amount) for amount in amounts] + [
        (thing, _draw_integer(rng, (1, MAX_AMOUNT))) for thing in other_things[: rng.integers(3)]
    ]
    order = rng.permutation(len(clauses))
    persons = _draw_distinct(rng, PERSONS, len(clauses))
    return Problem(
        tuple(
            (person, clauses[index][1], clauses[index][0])
            for person, index in zip(persons, order, strict=True)
        ),
        question,
    )


def valid_orders(terms: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield every order of the terms in which no partial sum is below zero."""
    if not terms:
        yield ()
    for index in range(len(terms)):
        rest = [*terms[:index], *terms[index + 1 :]]
        yield from ((*before, terms[index]) for before in valid_orders(rest) if sum(rest) >= 0)


def work_out(
    terms: Sequence[int], *, wrong_step: int | None = None, error: int = 0
) -> tuple[list[list[str]], int]:
    """Return the steps in this order of the terms, and the answer.

    Args:
        terms: Signed amounts.
        wrong_step: Index of a step with a wrong result, from which the others go on.
        error: Difference of this result from the right one. Where the vocabulary has no such
            number, the nearest one is taken.
    """
    total, steps = terms[0], []
    for number, term in enumerate(terms[1:]):
        result = total + term
        if number == wrong_step:
            result = result + error if 0 <= result + error < len(NUMBERS) else result - error
        # A wrong step may lead below zero or beyond the largest number.
        result = min(max(result, 0), len(NUMBERS) - 1)
        steps.append([str(total), "+" if term > 0 else "-", str(abs(term)), "=", str(result), ";"])
        total = result
    return steps, total


@dataclass(frozen=True)
class Noise:
    """Hold the shares of bad solutions in training documents.

    Attributes:
        wrong: Share of solutions with a wrong step.
        incomplete: Share of solutions without an answer.
    """

    wrong: float
    incomplete: float

    def __post_init__(self) -> None:
        if min(self.wrong, self.incomplete) < 0 or self.wrong + self.incomplete > 1:
            raise ValueError(
                f"wrong ({self.wrong}) and incomplete ({self.incomplete}) must be shares, "
                "together at most 1"
            )


def draw_solution(rng: Rng, problem: Problem, noise: Noise) -> list[str]:
    """Return the solution of a training document, without its end."""
    orders = list(valid_orders(problem.terms))
    terms = orders[int(rng.integers(len(orders)))]
    uniform = rng.random()
    bad_step = int(rng.integers(len(terms) - 1))
    error = int(rng.integers(1, 4) * rng.choice([-1, 1]))
    wrong = uniform < noise.wrong
    steps, answer = work_out(terms, wrong_step=bad_step if wrong else None, error=error)
    if not wrong and uniform < noise.wrong + noise.incomplete:
        return [word for step in steps[: bad_step + 1] for word in step]
    return _solution_words(steps, answer)


def _solution_words(steps: Sequence[Sequence[str]], answer: int) -> list[str]:
    return [*(word for step in steps for word in step), "answer", str(answer)]


def right_solutions(terms: Sequence[int]) -> set[tuple[str, ...]]:
    """Return every right solution: a step for each term, right results, and the sum as answer.

    There are so few answers that one of 16 guesses would mostly be right. Steps cannot be guessed.
    """
    return {tuple(_solution_words(*work_out(order))) for order in valid_orders(terms)}


def is_right(terms: Sequence[int], words: Sequence[str]) -> bool:
    """Return True if these words, and no others, are a right solution."""
    return tuple(words) in right_solutions(terms)


def sorted_terms(problem: Problem) -> tuple[int, ...]:
    """Return the terms in order; problems with equal ones count as the same."""
    return tuple(sorted(problem.terms))


def draw_copy_ids(rng: Rng) -> list[int]:
    """Return the ids of a copy document."""
    return encode([*draw_copy(rng).words, END])


def draw_needle_ids(rng: Rng) -> list[int]:
    """Return the ids of a needle document."""
    return encode([*draw_needle(rng).words, END])


def draw_sum_ids(noise: Noise, withheld: frozenset[tuple[int, ...]], rng: Rng) -> list[int]:
    """Return the ids of a sum document whose terms are not in `withheld`."""
    problem = draw_problem(rng)
    while sorted_terms(problem) in withheld:
        problem = draw_problem(rng)
    return encode([*problem.prompt, *draw_solution(rng, problem, noise), END])


def document_generators(
    noise: Noise, withheld: frozenset[tuple[int, ...]]
) -> dict[str, Callable[[Rng], list[int]]]:
    """Return a function for each kind that draws the ids of a document, with its end.

    Args:
        noise: Shares of bad solutions of sums.
        withheld: Sorted terms that no sum may have.
    """
    return {
        "copy": draw_copy_ids,
        "needle": draw_needle_ids,
        "sum": partial(draw_sum_ids, noise, withheld),
    }
