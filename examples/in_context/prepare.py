"""Write token files and probes of the language in language.py.

    python examples/in_context/prepare.py OUTPUT --sequences 4096 --length 128

Files:
    OUTPUT/train, more         token files (.bin, .idx), equally many but different sequences
    OUTPUT/heldout_copy, heldout_needle, heldout_sum
                               token files of held-out documents of each kind
    OUTPUT/probes.json         the prompts of probe.py

Each sequence of `length` ids is made of whole documents, so that a run with that
batch.sequence_length sees no document cut. No training document has a sum with the terms of a
held-out one, in any order.
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
from blocks import pack_blocks
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
# Most ids of a copy, a needle and a sum. The constants count the words that language.py adds:
# <copy>, <again>, <find> or <sum>, and the punctuation. The answer follows a sum's last step.
LONGEST = max(
    2 * language.SEGMENT[1] + language.GAP[1] + 3,
    language.CONTEXT[1] + 4 * language.PAIRS[1] + 2,
    4 * (language.MAX_TERMS + 2) + 4 + 6 * (language.MAX_TERMS - 1) + 3,
)


def main(words: Sequence[str] | None = None) -> int:
    """Write all files and return exit code 0."""
    parser = _parser()
    arguments = parser.parse_args(words)
    try:
        noise = Noise(arguments.wrong, arguments.incomplete)
    except ValueError as error:
        parser.error(str(error))
    if min(arguments.sequences, arguments.heldout, arguments.problems, arguments.probes) < 1:
        parser.error("--sequences, --heldout, --problems and --each must be at least 1")
    if arguments.length < LONGEST:
        parser.error(
            f"--length ({arguments.length}) must be at least {LONGEST}, the longest document"
        )
    probes, problems = draw_probes(
        make_rng(arguments.seed, "probes"), arguments.problems, arguments.probes
    )
    output: Path = arguments.output
    withheld = frozenset(map(language.sorted_terms, problems))
    training = language.document_generators(noise, withheld)
    # Held-out sums have right solutions and any terms: they measure what the model expects of
    # right solutions.
    heldout = language.document_generators(Noise(0.0, 0.0), frozenset())
    files = {
        "train": (arguments.sequences, list(training.values())),
        "more": (arguments.sequences, list(training.values())),
    }
    files |= {f"heldout_{kind}": (arguments.heldout, [heldout[kind]]) for kind in heldout}
    for name, (count, kinds) in files.items():
        write_blocks(output / name, make_rng(arguments.seed, name), kinds, count, arguments.length)
    write_atomically(output / "probes.json", json.dumps(probes).encode())
    print(
        f"{arguments.sequences} sequences of {arguments.length} tokens, twice; {len(WORDS)} ids; "
        f"{len(problems)} held-out problems"
    )
    return 0


def make_rng(seed: int, name: str) -> Rng:
    """Return a separate generator for each file, so that a longer file begins as a shorter one."""
    return np.random.default_rng([seed, STREAMS[name]])


def write_blocks(
    prefix: Path, rng: Rng, kinds: Sequence[Callable[[Rng], list[int]]], count: int, length: int
) -> None:
    """Write a token file of `count` samples.

    Each block is one document in the .idx. All have the length of a sample, so that none is cut.

    Args:
        prefix: Path of the files without their suffix.
        rng: Generator of the documents.
        kinds: Functions that draw a document.
        count: Number of samples.
        length: Ids of a sample.
    """
    with TokenFileWriter(prefix, optimal_dtype(len(WORDS))) as writer:
        # A sample's last label is the first id of another block: count + 1 blocks give `count`
        # samples.
        for block in pack_blocks(rng, kinds, count + 1, length):
            writer.add(np.array(block), np.array([length]))
        writer.commit(
            tokenizer_digest=hashlib.sha256(" ".join(WORDS).encode()).hexdigest(),
            vocab_size=len(WORDS),
        )


def draw_probes(rng: Rng, num_problems: int, count: int) -> tuple[dict[str, Any], list[Problem]]:
    """Return the prompts of probe.py as ids, and the sums among them.

    Args:
        rng: Generator of the prompts.
        num_problems: Number of sums.
        count: Number of documents for each gap, and for each context length with each depth.
    """
    copies = [
        language.draw_copy(rng, length=PROBE_SEGMENT, gap=gap) for gap in GAPS for _ in range(count)
    ]
    needles = [
        (depth, language.draw_needle(rng, context=context, pairs=PROBE_PAIRS, depth=depth))
        for context in CONTEXTS
        for depth in DEPTHS
        for _ in range(count)
    ]
    # There are too few sums of two terms to withhold some.
    problems = sorted(
        (language.draw_problem(rng, min_terms=3) for _ in range(num_problems)),
        key=lambda problem: len(problem.prompt),
    )
    probes = {
        "words": WORDS,
        "copy": [
            {"tokens": encode(copy.words), "start": copy.start, "distance": copy.distance}
            for copy in copies
        ],
        "needle": [
            {
                "prompt": encode(needle.prompt),
                "value": IDS[needle.answers[0][1]],
                "depth": depth,
                "context": needle.context,
            }
            for depth, needle in needles
        ],
        "sum": [{"prompt": encode(problem.prompt), "terms": problem.terms} for problem in problems],
    }
    return probes, problems


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
        dest="probes",
        metavar="N",
        type=int,
        default=32,
        help="probes for each gap, and for each context length with each depth (32)",
    )
    parser.add_argument(
        "--wrong", type=float, default=0.2, help="share of solutions with a wrong step (0.2)"
    )
    parser.add_argument(
        "--incomplete", type=float, default=0.1, help="share of solutions without an answer (0.1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
