"""Define the bigram sandbox of arXiv 2509.01649, a Markov chain with triggers that copy.

The chain has rows of high and of low entropy:

* After an id with a high-entropy row (first half of the vocabulary), `successors` ids are equally
  likely.
* After an id with a low-entropy row, one id has probability 1 - noise. The rest is spread over two
  other ids.
* A trigger is followed by its output, which is drawn once per sequence. To predict it, a model must
  find the trigger's last occurrence and copy the id that followed.

The paper gives this definition and no sizes. The sizes follow the code of "Birth of a Transformer"
(arXiv 2306.00802) where it has them. The others are chosen here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Chain:
    """Hold the transition matrix of a chain and its triggers.

    Attributes:
        rows: Probability of the next id, fp64 [V, V]. Rows sum to 1. Rows of triggers are not used.
        high: True for ids with a high-entropy row, bool [V].
        triggers: Trigger ids, int64 [T].
    """

    rows: Floats
    high: NDArray[np.bool_]
    triggers: Ids

    @property
    def vocab_size(self) -> int:
        """Return the number of ids."""
        return len(self.rows)

    @property
    def kinds(self) -> list[str]:
        """Return the kind of each id's row: "high", "low" or "trigger"."""
        names = np.where(self.high, "high", "low").astype("<U7")
        names[self.triggers] = "trigger"
        return [str(name) for name in names]


def make_chain(
    vocab_size: int, *, successors: int, triggers: int, noise: float, seed: int
) -> Chain:
    """Return a random chain whose triggers have half high-entropy, half low-entropy rows.

    Args:
        vocab_size: Number of ids.
        successors: Number of equally likely next ids in a high-entropy row.
        triggers: Number of trigger ids.
        noise: Probability outside the first successor of a low-entropy row.
        seed: Seed of the random numbers.

    Raises:
        ValueError: The sizes do not fit together.
    """
    if (
        not 1 <= successors <= vocab_size
        or not 0 <= triggers <= vocab_size // 2
        or not 0 <= noise < 1
    ):
        raise ValueError(
            f"{successors} successors and {triggers} triggers with noise {noise} "
            f"do not fit {vocab_size} ids"
        )
    rng = np.random.default_rng([seed, 0])
    rows = np.zeros((vocab_size, vocab_size))
    num_high = vocab_size // 2
    high = np.arange(vocab_size) < num_high
    # A permutation: every id follows some low-entropy row equally often, so none dies out.
    main_successors = rng.permutation(vocab_size)
    for row in range(vocab_size):
        if high[row]:
            rows[row, rng.choice(vocab_size, successors, replace=False)] = 1 / successors
        else:
            successor = main_successors[row]
            rows[row, successor] = 1 - noise
            others = rng.choice(np.delete(np.arange(vocab_size), successor), 2, replace=False)
            rows[row, others] += noise / 2
    high_triggers = rng.permutation(num_high)[: (triggers + 1) // 2]
    low_triggers = num_high + rng.permutation(vocab_size - num_high)[: triggers // 2]
    return Chain(rows, high, np.sort(np.concatenate([high_triggers, low_triggers])))


def sample_sequences(chain: Chain, count: int, length: int, *, seed: int) -> tuple[Ids, Ids]:
    """Return random sequences and the outputs of their triggers.

    Outputs are drawn uniformly from the ids that are not triggers. If a trigger led to a trigger,
    it could lead back to itself, and the sequence would never leave that cycle.

    Args:
        chain: Chain to sample from.
        count: Number of sequences N.
        length: Tokens of a sequence S.
        seed: Seed of the random numbers.

    Returns:
        Sequences, int64 [N, S], and the output of each trigger in each sequence, int64 [N, T].
    """
    rng = np.random.default_rng([seed, 1])
    outputs = rng.choice(
        np.delete(np.arange(chain.vocab_size), chain.triggers), (count, len(chain.triggers))
    )
    trigger_index = np.full(chain.vocab_size, -1)
    trigger_index[chain.triggers] = np.arange(len(chain.triggers))
    cumulative = chain.rows.cumsum(1)
    tokens = np.empty((count, length), dtype=np.int64)
    tokens[:, 0] = rng.integers(0, chain.vocab_size, count)
    sequences = np.arange(count)
    for position in range(1, length):
        previous = tokens[:, position - 1]
        uniform = rng.random((count, 1))
        successors = (cumulative[previous] < uniform).sum(1).clip(max=chain.vocab_size - 1)
        index = trigger_index[previous]
        tokens[:, position] = np.where(index >= 0, outputs[sequences, index], successors)
    return tokens, outputs


def next_id_probabilities(chain: Chain, tokens: Ids, outputs: Ids) -> Floats:
    """Return the distribution after each token, with known trigger outputs: the perfect teacher.

    Args:
        chain: Chain that the tokens were sampled from.
        tokens: Sequences, int64 [N, S].
        outputs: Output of each trigger in each sequence, int64 [N, T].

    Returns:
        Probabilities of the next id, fp64 [N, S, V].
    """
    probabilities = chain.rows[tokens]
    for index, trigger in enumerate(chain.triggers):
        sequence, position = np.nonzero(tokens == trigger)
        probabilities[sequence, position] = 0.0
        probabilities[sequence, position, outputs[sequence, index]] = 1.0
    return probabilities


def add_wrong_ids(perfect: Floats, tokens: Ids, *, wrong: float, ids: int, seed: int) -> Floats:
    """Return a teacher that puts `wrong` of its mass on `ids` wrong ids after each token.

    The wrong ids depend on the token alone.

    Args:
        perfect: Probabilities of the perfect teacher, fp64 [..., V].
        tokens: Tokens that the distributions follow, int64 [...].
        wrong: Mass on the wrong ids.
        ids: Number of wrong ids of a token.
        seed: Seed of the random numbers.

    Returns:
        Probabilities, fp64 [..., V].
    """
    vocab_size = perfect.shape[-1]
    rng = np.random.default_rng([seed, 2])
    wrong_ids = np.stack([rng.choice(vocab_size, ids, replace=False) for _ in range(vocab_size)])
    columns = wrong_ids[tokens]
    probabilities = perfect * (1 - wrong)
    mass = np.take_along_axis(probabilities, columns, -1) + wrong / ids
    np.put_along_axis(probabilities, columns, mass, -1)
    return probabilities
