"""Write the data and the exact teachers of the bigram sandbox.

    python examples/bigram_sandbox/prepare.py OUTPUT --sequences 10000 --heldout 256

Files:
    OUTPUT/train.{bin,idx}  the training sequences
    OUTPUT/heldout.npz      held-out sequences and the outputs of their triggers
    OUTPUT/chain.json       the chain
    OUTPUT/exact            a teacher cache of the chain's probabilities after each training token
    OUTPUT/imperfect        a teacher cache with part of the mass on wrong ids

A student reads either cache with teacher.source = "cached", like any other teacher.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from chain import (
    Chain,
    Floats,
    Ids,
    add_wrong_ids,
    make_chain,
    next_id_probabilities,
    sample_sequences,
)

from megatron_kd.cache import CacheIdentity, CacheWriter
from megatron_kd.data.preparation.token_file_writer import TokenFileWriter
from megatron_kd.data.token_files import optimal_dtype
from megatron_kd.storage.atomic_files import write_atomically
from megatron_kd.targets import SparseTarget, TopSelection

BLOCK = 256  # sequences whose distributions exist at one time


@dataclass(frozen=True)
class TeacherSettings:
    """Describe a teacher made from the chain.

    Attributes:
        wrong: Mass on wrong ids; 0 for the exact teacher.
        wrong_ids: Number of wrong ids of a token.
        slots: Largest number of ids that are stored for a token.
        seed: Seed of the wrong ids.
    """

    wrong: float
    wrong_ids: int
    slots: int
    seed: int


def main() -> None:
    """Write all files of the sandbox."""
    arguments = _parser().parse_args()
    chain = make_chain(
        arguments.vocab_size,
        successors=arguments.successors,
        triggers=arguments.triggers,
        noise=arguments.noise,
        seed=arguments.seed,
    )
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    tokens, outputs = sample_sequences(
        chain, arguments.sequences + 1, arguments.length, seed=arguments.seed
    )
    write_tokens(output / "train", tokens, chain.vocab_size)
    heldout_tokens, heldout_outputs = sample_sequences(
        chain, arguments.heldout, arguments.length, seed=arguments.seed + 1
    )
    np.savez(output / "heldout.npz", tokens=heldout_tokens, outputs=heldout_outputs)
    for name, wrong in (("exact", 0.0), ("imperfect", arguments.wrong)):
        slots = max(arguments.successors, 3) + (arguments.wrong_ids if wrong else 0)
        settings = TeacherSettings(wrong, arguments.wrong_ids, slots, arguments.seed)
        write_teacher(output / name, chain, tokens, outputs, settings)
    description = {
        "kind": chain.kinds,
        "triggers": chain.triggers.tolist(),
        "rows": chain.rows.tolist(),
        "wrong": arguments.wrong,
    }
    write_atomically(output / "chain.json", json.dumps(description).encode())
    print(
        f"{len(tokens)} sequences of {arguments.length} tokens, {tokens.size} tokens; "
        f"entropies {row_entropies(chain)}"
    )


def write_tokens(prefix: Path, tokens: Ids, vocab_size: int) -> None:
    """Write a token file with one document per sequence.

    Documents are shuffled before they are cut into samples. All have the same length, so that no
    sample holds parts of two. The last label of a sample is the first id of another sequence.
    Therefore N + 1 sequences give N samples, and one sequence, unknown beforehand, is left out.

    Args:
        prefix: Path of the files without their suffix.
        tokens: Sequences, int64 [N + 1, S].
        vocab_size: Number of ids.
    """
    with TokenFileWriter(prefix, optimal_dtype(vocab_size)) as writer:
        writer.add(tokens.flatten(), np.full(len(tokens), tokens.shape[1]))
        writer.commit(
            tokenizer_digest=hashlib.sha256(f"ids 0 to {vocab_size - 1}".encode()).hexdigest(),
            vocab_size=vocab_size,
        )


def write_teacher(
    directory: Path, chain: Chain, tokens: Ids, outputs: Ids, settings: TeacherSettings
) -> None:
    """Write a teacher cache with the distribution after every token.

    Args:
        directory: Folder of the cache.
        chain: Chain that the tokens were sampled from.
        tokens: Sequences, int64 [N, S].
        outputs: Output of each trigger in each sequence, int64 [N, T].
        settings: The teacher.
    """
    text = (
        f"chain {chain.rows.tobytes().hex()} {chain.triggers.tolist()} wrong {settings.wrong} "
        f"on {settings.wrong_ids} ids, seed {settings.seed}"
    )
    identity = CacheIdentity(
        teacher=hashlib.sha256(text.encode()).hexdigest(),
        tokenizer=None,
        vocab_size=chain.vocab_size,
        sequence_length=tokens.shape[1],
        selection=TopSelection(settings.slots),
        value_encoding="fp32",
    )
    with CacheWriter(directory, identity) as writer:
        for start in range(0, len(tokens), BLOCK):
            block = tokens[start : start + BLOCK]
            probabilities = next_id_probabilities(chain, block, outputs[start : start + BLOCK])
            if settings.wrong:
                probabilities = add_wrong_ids(
                    probabilities,
                    block,
                    wrong=settings.wrong,
                    ids=settings.wrong_ids,
                    seed=settings.seed,
                )
            # Another sequence follows, which begins with any id.
            probabilities[:, -1] = 1 / chain.vocab_size
            for sample, distribution in zip(block, probabilities, strict=True):
                writer.add(torch.from_numpy(sample), sparse_target(distribution, settings.slots))


def sparse_target(distribution: Floats, slots: int) -> SparseTarget:
    """Return the `slots` most probable ids of each distribution [S, V], the rest as tail.

    All positions but the last have at most `slots` ids, so that nothing is lost. The last position
    of a sequence, which may be followed by any id, keeps a part of them.
    """
    order = np.argsort(-distribution, axis=1, kind="stable")[:, :slots]
    kept = np.take_along_axis(distribution, order, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        logprobs = np.log(kept)
        entropy = -np.where(distribution > 0, distribution * np.log(distribution), 0.0).sum(1)
        tail = np.log(np.clip(1 - kept.sum(1), 0.0, None))
    tail = np.where(kept.sum(1) > 1 - 1e-9, -np.inf, tail)
    return SparseTarget(
        torch.from_numpy(np.where(kept > 0, order, -1)).int(),
        torch.from_numpy(logprobs).float(),
        torch.from_numpy(tail).float(),
        torch.from_numpy(entropy).float(),
    )


def row_entropies(chain: Chain) -> str:
    """Return the mean entropy in nats of high- and low-entropy rows, as text."""
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(chain.rows > 0, chain.rows * np.log(chain.rows), 0.0).sum(1)
    kinds = np.array(chain.kinds)
    return ", ".join(f"{name} {entropy[kinds == name].mean():.2f}" for name in ("high", "low"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--sequences", type=int, default=10_000, help="training sequences (10000)")
    parser.add_argument("--heldout", type=int, default=256, help="held-out sequences (256)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence (128)")
    parser.add_argument("--vocab-size", type=int, default=32, help="number of ids (32)")
    parser.add_argument(
        "--successors",
        type=int,
        default=8,
        help="equally likely successors in a high-entropy row (8)",
    )
    parser.add_argument("--triggers", type=int, default=4, help="number of trigger ids (4)")
    parser.add_argument(
        "--noise",
        type=float,
        default=0.05,
        help="mass of a low-entropy row outside its successor (0.05)",
    )
    parser.add_argument(
        "--wrong", type=float, default=0.3, help="mass of the imperfect teacher on wrong ids (0.3)"
    )
    parser.add_argument(
        "--wrong-ids", type=int, default=4, help="number of wrong ids of a token (4)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the chain and the sequences (0)"
    )
    return parser


if __name__ == "__main__":
    main()
