"""The bigram sandbox of arXiv 2509.01649: a Markov chain with rows of high and of low entropy, and triggers that copy.

A token is followed by one of `successors` ids, all equally likely (high-entropy rows, the first half of the vocabulary), or nearly
always by the same one (low-entropy rows: 1 - noise for one id, the rest spread over two others). A trigger is followed by its output,
which is drawn once per sequence: whoever wants to predict it must find the trigger's last occurrence and copy what came after it. The
paper gives this definition and none of its sizes; those here follow the code of "Birth of a Transformer" (arXiv 2306.00802) where that
has them, and are ours elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Chain:
    """rows [V, V]: probability of the next id, rows sum to 1 (those of triggers are not used). high: bool [V]. triggers: ids [T]."""

    rows: Floats
    high: NDArray[np.bool_]
    triggers: Ids

    @property
    def vocab_size(self) -> int:
        return len(self.rows)

    @property
    def kind(self) -> list[str]:
        """What each id's row is: "high", "low" or "trigger"."""
        names = np.where(self.high, "high", "low").astype("<U7")
        names[self.triggers] = "trigger"
        return [str(name) for name in names]


def make_chain(
    vocab_size: int, *, successors: int, triggers: int, noise: float, seed: int
) -> Chain:
    """A random chain; triggers are half high, half low rows. ValueError for sizes that do not fit."""
    if (
        not 1 <= successors <= vocab_size
        or not 0 <= triggers <= vocab_size // 2
        or not 0 <= noise < 1
    ):
        raise ValueError(
            f"{successors} successors and {triggers} triggers with noise {noise} do not fit {vocab_size} ids"
        )
    rng = np.random.default_rng([seed, 0])
    rows = np.zeros((vocab_size, vocab_size))
    high = np.arange(vocab_size) < vocab_size // 2
    following = rng.permutation(
        vocab_size
    )  # every id follows some low row as often as any other: none dies out
    for row in range(vocab_size):
        if high[row]:
            rows[row, rng.choice(vocab_size, successors, replace=False)] = 1 / successors
        else:
            rows[row, following[row]] = 1 - noise
            others = rng.choice(np.delete(np.arange(vocab_size), following[row]), 2, replace=False)
            rows[row, others] += noise / 2
    chosen = rng.permutation(np.r_[rng.permutation(vocab_size // 2)[: (triggers + 1) // 2],
                                   vocab_size // 2 + rng.permutation(vocab_size - vocab_size // 2)[: triggers // 2]])  # fmt: skip
    return Chain(rows, high, np.sort(chosen))


def sample(chain: Chain, count: int, length: int, *, seed: int) -> tuple[Ids, Ids]:
    """Sequences [count, length] and the outputs of their triggers [count, T], drawn uniformly from all other ids: a trigger that led to
    a trigger could lead back to itself, and the sequence would never leave the circle."""
    rng = np.random.default_rng([seed, 1])
    outputs = rng.choice(
        np.delete(np.arange(chain.vocab_size), chain.triggers), (count, len(chain.triggers))
    )
    place = np.full(chain.vocab_size, -1)
    place[chain.triggers] = np.arange(len(chain.triggers))
    steps = chain.rows.cumsum(1)
    tokens = np.empty((count, length), dtype=np.int64)
    tokens[:, 0] = rng.integers(0, chain.vocab_size, count)
    everyone = np.arange(count)
    for at in range(1, length):
        last = tokens[:, at - 1]
        drawn = (steps[last] < rng.random((count, 1))).sum(1).clip(max=chain.vocab_size - 1)
        which = place[last]
        tokens[:, at] = np.where(which >= 0, outputs[everyone, which], drawn)
    return tokens, outputs


def next_ids(chain: Chain, tokens: Ids, outputs: Ids) -> Floats:
    """[..., V]: what follows each of `tokens` [count, length], the trigger's output known: the perfect teacher."""
    found = chain.rows[tokens]
    for place, trigger in enumerate(chain.triggers):
        sequence, position = np.nonzero(tokens == trigger)
        found[sequence, position] = 0.0
        found[sequence, position, outputs[sequence, place]] = 1.0
    return found


def imperfect(perfect: Floats, tokens: Ids, *, wrong: float, ids: int, seed: int) -> Floats:
    """A teacher with `wrong` of its mass on `ids` wrong ids for each token that it stands at: the same ones every time."""
    vocab_size = perfect.shape[-1]
    rng = np.random.default_rng([seed, 2])
    mistaken = np.stack([rng.choice(vocab_size, ids, replace=False) for _ in range(vocab_size)])[
        tokens
    ]
    found = perfect * (1 - wrong)
    np.put_along_axis(found, mistaken, np.take_along_axis(found, mistaken, -1) + wrong / ids, -1)
    return found
