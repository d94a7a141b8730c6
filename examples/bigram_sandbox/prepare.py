"""Data and exact teachers of the bigram sandbox.

    python examples/bigram_sandbox/prepare.py OUTPUT --sequences 10000 --heldout 256

Writes OUTPUT/train.{bin,idx}, OUTPUT/heldout.npz (sequences and their triggers' outputs), OUTPUT/chain.json, and two teacher caches: what
the chain itself says of every training token (OUTPUT/exact), and the same with mass on wrong ids (OUTPUT/imperfect). A student reads either
with teacher.source = "cached", as it would read any other teacher.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from chain import Chain, Floats, Ids, imperfect, make_chain, next_ids, sample

from megatron_kd.cache import CacheIdentity, CacheWriter
from megatron_kd.data.preparation.token_file_writer import TokenFileWriter
from megatron_kd.data.token_files import optimal_dtype
from megatron_kd.storage.atomic_files import write_atomically
from megatron_kd.targets import SparseTarget, TopSelection

BLOCK = 256  # sequences whose distributions exist at one time


def main() -> None:
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
    tokens, outputs = sample(chain, arguments.sequences + 1, arguments.length, seed=arguments.seed)
    write_tokens(output / "train", tokens, chain.vocab_size)
    held, held_outputs = sample(chain, arguments.heldout, arguments.length, seed=arguments.seed + 1)
    np.savez(output / "heldout.npz", tokens=held, outputs=held_outputs)
    for name, wrong in (("exact", 0.0), ("imperfect", arguments.wrong)):
        slots = max(arguments.successors, 3) + (arguments.wrong_ids if wrong else 0)
        write_teacher(
            output / name, chain, tokens, outputs, wrong, arguments.wrong_ids, slots, arguments.seed
        )
    about = {
        "kind": chain.kind,
        "triggers": chain.triggers.tolist(),
        "rows": chain.rows.tolist(),
        "wrong": arguments.wrong,
    }
    write_atomically(output / "chain.json", json.dumps(about).encode())
    print(
        f"{len(tokens)} sequences of {arguments.length} tokens, {tokens.size} tokens; entropies {row_entropies(chain)}"
    )


def write_tokens(prefix: Path, tokens: Ids, vocab_size: int) -> None:
    """One document a sequence, all but the last of `tokens` [N + 1, S] samples of their own.

    Documents are shuffled before they are cut into samples: with all of one length no sample holds parts of two. A sample's last label is
    the first id of another sequence, so that with one sequence more there are N samples; which one is left out nobody can say.
    """
    with TokenFileWriter(prefix, optimal_dtype(vocab_size)) as writer:
        writer.add(tokens.flatten(), np.full(len(tokens), tokens.shape[1]))
        writer.commit(
            tokenizer_digest=hashlib.sha256(f"ids 0 to {vocab_size - 1}".encode()).hexdigest(),
            vocab_size=vocab_size,
        )


def write_teacher(
    directory: Path,
    chain: Chain,
    tokens: Ids,
    outputs: Ids,
    wrong: float,
    wrong_ids: int,
    slots: int,
    seed: int,
) -> None:
    """A cache with the teacher's whole distribution of every token, on `slots` ids at most."""
    text = f"chain {chain.rows.tobytes().hex()} {chain.triggers.tolist()} wrong {wrong} on {wrong_ids} ids, seed {seed}"
    identity = CacheIdentity(
        teacher=hashlib.sha256(text.encode()).hexdigest(),
        tokenizer=None,
        vocab_size=chain.vocab_size,
        sequence_length=tokens.shape[1],
        selection=TopSelection(slots),
        value_encoding="fp32",
    )
    with CacheWriter(directory, identity) as writer:
        for start in range(0, len(tokens), BLOCK):
            part = tokens[start : start + BLOCK]
            said = next_ids(chain, part, outputs[start : start + BLOCK])
            if wrong:
                said = imperfect(said, part, wrong=wrong, ids=wrong_ids, seed=seed)
            said[:, -1] = (
                1 / chain.vocab_size
            )  # what follows is another sequence, which begins anywhere
            for row, distribution in zip(part, said, strict=True):
                writer.add(torch.from_numpy(row), whole_target(distribution, slots))


def whole_target(distribution: Floats, slots: int) -> SparseTarget:
    """[S, V] -> its likeliest `slots` ids; the last position of a sequence, which may be any id, keeps a part of them."""
    order = np.argsort(-distribution, axis=1, kind="stable")[:, :slots]
    kept = np.take_along_axis(distribution, order, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(kept)
        entropy = -np.where(distribution > 0, distribution * np.log(distribution), 0.0).sum(1)
        tail = np.log(np.clip(1 - kept.sum(1), 0.0, None))
    tail = np.where(kept.sum(1) > 1 - 1e-9, -np.inf, tail)
    return SparseTarget(
        torch.from_numpy(np.where(kept > 0, order, -1)).int(),
        torch.from_numpy(logs).float(),
        torch.from_numpy(tail).float(),
        torch.from_numpy(entropy).float(),
    )


def row_entropies(chain: Chain) -> str:
    """Mean entropy of each kind of row, nats."""
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(chain.rows > 0, chain.rows * np.log(chain.rows), 0.0).sum(1)
    kind = np.array(chain.kind)
    return ", ".join(f"{name} {entropy[kind == name].mean():.2f}" for name in ("high", "low"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--sequences", type=int, default=10_000, help="training sequences (10000)")
    parser.add_argument("--heldout", type=int, default=256, help="held-out sequences (256)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence (128)")
    parser.add_argument("--vocab-size", type=int, default=32, help="ids (32)")
    parser.add_argument(
        "--successors",
        type=int,
        default=8,
        help="equally likely successors in a high-entropy row (8)",
    )
    parser.add_argument("--triggers", type=int, default=4, help="trigger ids (4)")
    parser.add_argument(
        "--noise",
        type=float,
        default=0.05,
        help="mass of a low-entropy row outside its successor (0.05)",
    )
    parser.add_argument(
        "--wrong", type=float, default=0.3, help="mass of the imperfect teacher on wrong ids (0.3)"
    )
    parser.add_argument("--wrong-ids", type=int, default=4, help="on so many (4)")
    parser.add_argument("--seed", type=int, default=0, help="of the chain and the sequences (0)")
    return parser


if __name__ == "__main__":
    main()
