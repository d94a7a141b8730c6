"""A small language with three kinds of documents, whose every answer can be computed.

    <copy> s3 s17 s9 .. o3 o1 .. <again> s3 s17 s9 .. <end>                  what stood before comes again, some tokens later
    <find> o3 k4 v9 o1 o1 k7 v2 o5 ? k7 : v2 ? k4 : v9 <end>                 pairs of key and value in filler, and some that are asked for
    <sum> p1 finds 3 t0 p4 finds 5 t2 p2 finds 4 t0 ? t0 : 4 + 3 = 7 ; answer 7 <end>

A sum may be worked out in any order of its terms that never goes below zero: a problem has several right solutions. In training documents
some solutions have a wrong step, and go on from its result, and some stop without an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Rng = np.random.Generator

END, COPY, AGAIN, FIND, SUM = "<end>", "<copy>", "<again>", "<find>", "<sum>"
SYMBOLS = tuple(f"s{n}" for n in range(24))
FILLERS = tuple(f"o{n}" for n in range(8))
KEYS, VALUES = tuple(f"k{n}" for n in range(12)), tuple(f"v{n}" for n in range(12))
PERSONS, THINGS = tuple(f"p{n}" for n in range(8)), tuple(f"t{n}" for n in range(4))
MOST_TERMS, MOST_AMOUNT = 4, 9
NUMBERS = tuple(str(n) for n in range(MOST_TERMS * MOST_AMOUNT + 1))
WORDS = (END, COPY, AGAIN, FIND, SUM, "?", ":", ";", "+", "-", "=", "answer", "finds", "loses",
         *SYMBOLS, *FILLERS, *KEYS, *VALUES, *PERSONS, *THINGS, *NUMBERS)  # fmt: skip
IDS = {word: number for number, word in enumerate(WORDS)}
# Short gaps and many questions: with less to be found in a sequence, models of this size had not begun to copy after 2,000 steps.
SEGMENT, GAP, CONTEXT, PAIRS = (8, 20), (0, 24), (24, 64), (4, 10)


def encode(words: Sequence[str]) -> list[int]:
    """Ids of words."""
    return [IDS[word] for word in words]


def _some(rng: Rng, words: Sequence[str], count: int) -> list[str]:
    return [words[place] for place in rng.integers(0, len(words), count)]


def _distinct(rng: Rng, words: Sequence[str], count: int) -> list[str]:
    return [words[place] for place in rng.permutation(len(words))[:count]]


def _within(rng: Rng, bounds: tuple[int, int]) -> int:
    return int(rng.integers(bounds[0], bounds[1] + 1))


@dataclass(frozen=True)
class Copy:
    """words: the document without its end. start: place of the first word that comes again, `distance` words after it came first."""

    words: list[str]
    start: int
    distance: int


def copy(rng: Rng, *, length: int | None = None, gap: int | None = None) -> Copy:
    """A segment of different symbols, `gap` fillers, and the segment again."""
    length, gap = (
        _within(rng, SEGMENT) if length is None else length,
        _within(rng, GAP) if gap is None else gap,
    )
    segment = _distinct(rng, SYMBOLS, length)
    words = [COPY, *segment, *_some(rng, FILLERS, gap), AGAIN, *segment]
    return Copy(words, length + gap + 2, length + gap + 1)


@dataclass(frozen=True)
class Needle:
    """body: the document up to its first question. answers: (key, value), in the order in which they are asked. depth: where the first
    of these pairs stands in the context, 0 its beginning, 1 its end."""

    body: list[str]
    answers: list[tuple[str, str]]
    depth: float
    context: int

    @property
    def prompt(self) -> list[str]:
        """All up to the first answer."""
        return [*self.body, "?", self.answers[0][0], ":"]

    @property
    def words(self) -> list[str]:
        """The document without its end."""
        return [
            *self.body,
            *(word for key, value in self.answers for word in ("?", key, ":", value)),
        ]


def needle(
    rng: Rng, *, context: int | None = None, pairs: int | None = None, depth: float | None = None
) -> Needle:
    """Pairs of key and value at random places of `context` words, and 1 to all of them asked for; `depth` places the first of these."""
    context, pairs = (
        _within(rng, CONTEXT) if context is None else context,
        _within(rng, PAIRS) if pairs is None else pairs,
    )
    keys, values = _distinct(rng, KEYS, pairs), _some(rng, VALUES, pairs)
    # A pair is one piece among fillers: no two overlap.
    pieces = context - pairs
    asked = int(rng.integers(pieces)) if depth is None else round(depth * (pieces - 1))
    others = [place for place in rng.permutation(pieces) if place != asked][: pairs - 1]
    pair_at = dict(zip([asked, *others], zip(keys, values, strict=True), strict=True))
    body = [
        word
        for place, filler in enumerate(_some(rng, FILLERS, pieces))
        for word in pair_at.get(place, (filler,))
    ]
    answers = list(zip(keys, values, strict=True))[: _within(rng, (1, pairs))]
    return Needle([FIND, *body], answers, asked / max(pieces - 1, 1), context)


@dataclass(frozen=True)
class Problem:
    """clauses: (person, signed amount, thing). The answer is the sum of the amounts of the thing `asked`."""

    clauses: tuple[tuple[str, int, str], ...]
    asked: str

    @property
    def terms(self) -> list[int]:
        """Signed amounts of what is asked for, in the order of the text."""
        return [amount for _, amount, thing in self.clauses if thing == self.asked]

    @property
    def prompt(self) -> list[str]:
        """The document up to its solution."""
        told = [
            word
            for who, amount, thing in self.clauses
            for word in (who, "finds" if amount > 0 else "loses", str(abs(amount)), thing)
        ]
        return [SUM, *told, "?", self.asked, ":"]


def problem(rng: Rng, *, fewest_terms: int = 2) -> Problem:
    """Up to MOST_TERMS amounts of one thing, up to two of others between them; no sum is below zero."""
    asked, *others = _distinct(rng, THINGS, 3)
    count = _within(rng, (fewest_terms, MOST_TERMS))
    while True:
        amounts = [
            int(value)
            for value in rng.integers(1, MOST_AMOUNT + 1, count) * rng.choice([1, 1, -1], count)
        ]
        if sum(amounts) >= 0 and max(amounts) > 0:
            break
    clauses = [(asked, amount) for amount in amounts] + [
        (thing, _within(rng, (1, MOST_AMOUNT))) for thing in others[: rng.integers(3)]
    ]
    order = rng.permutation(len(clauses))
    who = _distinct(rng, PERSONS, len(clauses))
    return Problem(
        tuple(
            (person, clauses[place][1], clauses[place][0])
            for person, place in zip(who, order, strict=True)
        ),
        asked,
    )


def orders(terms: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every order in which no sum on the way is below zero: the right solutions with steps."""
    if not terms:
        yield ()
    for place in range(len(terms)):
        rest = [*terms[:place], *terms[place + 1 :]]
        yield from ((*before, terms[place]) for before in orders(rest) if sum(rest) >= 0)


def work_out(
    terms: Sequence[int], *, wrong_step: int | None = None, error: int = 0
) -> tuple[list[list[str]], int]:
    """Steps in this order of the terms, and the answer; from `wrong_step` on with a result that is wrong by `error`, or as near to it
    as there are numbers."""
    so_far, steps = terms[0], []
    for number, term in enumerate(terms[1:]):
        result = so_far + term
        if number == wrong_step:
            result = result + error if 0 <= result + error < len(NUMBERS) else result - error
        # A wrong step may lead below zero, or above the numbers that there are.
        result = min(max(result, 0), len(NUMBERS) - 1)
        steps.append([str(so_far), "+" if term > 0 else "-", str(abs(term)), "=", str(result), ";"])
        so_far = result
    return steps, so_far


@dataclass(frozen=True)
class Noise:
    """Shares of training solutions: with a wrong step, without an answer. The rest is right."""

    wrong: float
    incomplete: float

    def __post_init__(self) -> None:
        if min(self.wrong, self.incomplete) < 0 or self.wrong + self.incomplete > 1:
            raise ValueError(
                f"wrong ({self.wrong}) and incomplete ({self.incomplete}) must be shares, together at most 1"
            )


def solution(rng: Rng, asked: Problem, noise: Noise) -> list[str]:
    """A training document's solution, without its end."""
    possible = list(orders(asked.terms))
    terms = possible[int(rng.integers(len(possible)))]
    drawn, at, error = (
        rng.random(),
        int(rng.integers(len(terms) - 1)),
        int(rng.integers(1, 4) * rng.choice([-1, 1])),
    )
    wrong = drawn < noise.wrong
    steps, answer = work_out(terms, wrong_step=at if wrong else None, error=error)
    if not wrong and drawn < noise.wrong + noise.incomplete:
        return [word for step in steps[: at + 1] for word in step]
    return _told(steps, answer)


def _told(steps: Sequence[Sequence[str]], answer: int) -> list[str]:
    return [*(word for step in steps for word in step), "answer", str(answer)]


def right_solutions(terms: Sequence[int]) -> set[tuple[str, ...]]:
    """All there are: a step for every term, each result right, and the sum as the answer. The answers alone are so few that guessing one
    in 16 tries would mostly do; the steps cannot be guessed."""
    return {tuple(_told(*work_out(order))) for order in orders(terms)}


def verify(terms: Sequence[int], solved: Sequence[str]) -> bool:
    """Whether these words, and no others, are a right solution."""
    return tuple(solved) in right_solutions(terms)


def same_sums(asked: Problem) -> tuple[int, ...]:
    """What makes a problem the same as another: its terms, in any order, whoever finds or loses whatever."""
    return tuple(sorted(asked.terms))


def makers(
    noise: Noise, withheld: frozenset[tuple[int, ...]]
) -> dict[str, Callable[[Rng], list[int]]]:
    """By kind: a function that draws a document's ids, its end included. No sum has the terms of one in `withheld`."""

    def add(rng: Rng) -> list[int]:
        drawn = problem(rng)
        while same_sums(drawn) in withheld:
            drawn = problem(rng)
        return encode([*drawn.prompt, *solution(rng, drawn, noise), END])

    return {
        "copy": lambda rng: encode([*copy(rng).words, END]),
        "needle": lambda rng: encode([*needle(rng).words, END]),
        "sum": add,
    }


LOOK_AHEAD = 64  # documents among which the one that fits best is taken


def blocks(
    rng: Rng, kinds: Sequence[Callable[[Rng], list[int]]], count: int, length: int
) -> Iterator[list[int]]:
    """`count` times `length` ids, made of whole documents of these kinds, drawn alike; what stays free at the end is filled with <end>.

    Of the next LOOK_AHEAD documents the longest that fits is taken. ValueError where a document is longer than a block.
    """
    waiting: list[list[int]] = []
    for _ in range(count):
        block: list[int] = []
        while True:
            waiting += [
                kinds[place](rng)
                for place in rng.integers(0, len(kinds), LOOK_AHEAD - len(waiting))
            ]
            if max(map(len, waiting)) > length:
                raise ValueError(
                    f"a document has {max(map(len, waiting))} ids and a block {length}: make blocks longer"
                )
            # The oldest begins a block, so that none waits for ever.
            free = length - len(block)
            chosen = (
                max(waiting, key=lambda each: len(each) if len(each) <= free else -1)
                if block
                else waiting[0]
            )
            if len(chosen) > free:
                break
            waiting.remove(chosen)
            block += chosen
        yield block + [IDS[END]] * (length - len(block))
