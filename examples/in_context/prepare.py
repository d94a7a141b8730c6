"""Token files and probes of the language in language.py.

    python examples/in_context/prepare.py OUTPUT --sequences 4096 --length 128

Writes OUTPUT/train and OUTPUT/more (both .bin and .idx; as many sequences, other ones), OUTPUT/heldout_copy, heldout_needle and
heldout_sum, and OUTPUT/probes.json with the prompts of probe.py. Each sequence of `length` ids is made of whole documents, so that a run
with that batch.sequence_length sees no document cut. No training document has a sum with the terms of a held-out one, in any order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import language
from language import IDS, WORDS, Noise, Problem, Rng, encode

from megatron_kd.data.preparation.token_file_writer import TokenFileWriter
from megatron_kd.data.token_files import optimal_dtype
from megatron_kd.storage.atomic_files import write_atomically

GAPS, CONTEXTS, DEPTHS = (0, 6, 12, 18, 24), (24, 32, 48, 64), (0.0, 0.25, 0.5, 0.75, 1.0)
PROBE_SEGMENT, PROBE_PAIRS = 8, 4
STREAMS = {
    name: number
    for number, name in enumerate(
        ("probes", "train", "more", "heldout_copy", "heldout_needle", "heldout_sum")
    )
}


def main(words: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(words)
    try:
        noise = Noise(arguments.wrong, arguments.incomplete)
    except ValueError as error:
        parser.error(str(error))
    if min(arguments.sequences, arguments.heldout, arguments.problems, arguments.each) < 1:
        parser.error("--sequences, --heldout, --problems and --each must be at least 1")
    if arguments.length < LONGEST:
        parser.error(
            f"--length ({arguments.length}) must be at least {LONGEST}, the longest document"
        )
    probes, problems = draw_probes(
        rng_of(arguments.seed, "probes"), arguments.problems, arguments.each
    )
    output: Path = arguments.output
    withheld = frozenset(map(language.same_sums, problems))
    kinds = language.makers(noise, withheld)
    # Held-out sums are worked out without mistakes, and with any terms: what the model expects of right solutions.
    right = language.makers(Noise(0.0, 0.0), frozenset())
    made = {
        "train": (arguments.sequences, list(kinds.values())),
        "more": (arguments.sequences, list(kinds.values())),
    }
    made |= {f"heldout_{kind}": (arguments.heldout, [right[kind]]) for kind in kinds}
    for name, (count, drawn) in made.items():
        write_blocks(output / name, rng_of(arguments.seed, name), drawn, count, arguments.length)
    write_atomically(output / "probes.json", json.dumps(probes).encode())
    print(
        f"{arguments.sequences} sequences of {arguments.length} tokens, twice; {len(WORDS)} ids; {len(problems)} held-out problems"
    )
    return 0


# 1: <copy>, <again>, <find> or <sum>; the rest as in language.py. A sum's last step is followed by its answer.
LONGEST = max(
    2 * language.SEGMENT[1] + language.GAP[1] + 3,
    language.CONTEXT[1] + 4 * language.PAIRS[1] + 2,
    4 * (language.MOST_TERMS + 2) + 4 + 6 * (language.MOST_TERMS - 1) + 3,
)


def rng_of(seed: int, name: str) -> Rng:
    """A stream of its own for each file: a longer one begins as a shorter one does."""
    return np.random.default_rng([seed, STREAMS[name]])


def write_blocks(
    prefix: Path, rng: Rng, kinds: Sequence[Callable[[Rng], list[int]]], count: int, length: int
) -> None:
    """`count` samples. Each block stands as one document in the .idx, and is cut nowhere else: all have the length of a sample."""
    with TokenFileWriter(prefix, optimal_dtype(len(WORDS))) as writer:
        # A sample's last label is the first id of another block: with one block more there are `count` samples.
        for block in language.blocks(rng, kinds, count + 1, length):
            writer.add(np.array(block), np.array([length]))
        writer.commit(
            tokenizer_digest=hashlib.sha256(" ".join(WORDS).encode()).hexdigest(),
            vocab_size=len(WORDS),
        )


def draw_probes(rng: Rng, problems: int, each: int) -> tuple[dict[str, Any], list[Problem]]:
    """What probe.py asks, as ids: `each` documents for a gap, and for a context length with a depth; and the sums among them."""
    copies = [
        language.copy(rng, length=PROBE_SEGMENT, gap=gap) for gap in GAPS for _ in range(each)
    ]
    needles = [
        (depth, language.needle(rng, context=context, pairs=PROBE_PAIRS, depth=depth))
        for context in CONTEXTS
        for depth in DEPTHS
        for _ in range(each)
    ]
    # Two terms leave too few sums to withhold some.
    sums = sorted(
        (language.problem(rng, fewest_terms=3) for _ in range(problems)),
        key=lambda asked: len(asked.prompt),
    )
    found = {
        "words": WORDS,
        "copy": [
            {"tokens": encode(one.words), "start": one.start, "distance": one.distance}
            for one in copies
        ],
        "needle": [
            {
                "prompt": encode(one.prompt),
                "value": IDS[one.answers[0][1]],
                "depth": depth,
                "context": one.context,
            }
            for depth, one in needles
        ],
        "sum": [{"prompt": encode(one.prompt), "terms": one.terms} for one in sums],
    }
    return found, sums


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument(
        "--sequences",
        type=int,
        default=4096,
        help="training sequences, in each of train and more (4096)",
    )
    parser.add_argument(
        "--heldout", type=int, default=64, help="held-out sequences of each kind (64)"
    )
    parser.add_argument("--length", type=int, default=128, help="ids of a sequence (128)")
    parser.add_argument("--problems", type=int, default=128, help="held-out sums (128)")
    parser.add_argument(
        "--each",
        type=int,
        default=32,
        help="probes for each gap, and each context length with each depth (32)",
    )
    parser.add_argument(
        "--wrong", type=float, default=0.2, help="share of solutions with a wrong step (0.2)"
    )
    parser.add_argument(
        "--incomplete", type=float, default=0.1, help="share of solutions without an answer (0.1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn (0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
