"""Look into Megatron token files: counts, lengths, a few documents as text, and a complete check.

    python tools/inspect_data.py data/train --tokenizer tokenizer.model --show 2
    python tools/inspect_data.py data/train data/valid --vocab-size 32000 --json

Reads every id. Exit codes: 0 sound, 1 something is wrong with a file, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kd.config import ConfigError
from megatron_kd.data.token_file_checks import check_token_file
from megatron_kd.data.token_files import read_index
from megatron_kd.data.tokenizer import TokenizerInfo, load_tokenizer
from megatron_kd.data.vocabularies.base import Vocabulary

_BLOCK = 1 << 24
_BARS = 50


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("prefixes", nargs="+", metavar="PREFIX", help="token files, without .bin/.idx")
    add(
        "--tokenizer",
        metavar="PATH",
        help="check ids, and the tokenizer that the .json file names, against this one; decode with it",
    )
    add(
        "--end-of-document",
        metavar="TOKEN",
        help="token that ends documents, where it is not the tokenizer's own",
    )
    add(
        "--vocab-size",
        type=int,
        metavar="N",
        help="check ids against this many; unset: the tokenizer's",
    )
    add(
        "--show",
        type=int,
        default=0,
        metavar="N",
        help="print the beginnings of N documents, evenly spaced (needs --tokenizer)",
    )
    add(
        "--characters",
        type=int,
        default=300,
        metavar="N",
        help="of each document shown (%(default)s)",
    )
    add(
        "--picture",
        type=Path,
        metavar="FILE",
        help="write the histogram of lengths as a picture, such as lengths.png (needs matplotlib)",
    )
    add("--json", action="store_true", help="print one JSON object")
    parsed = parser.parse_args(arguments)
    if parsed.show and not parsed.tokenizer:
        parser.error("--show needs --tokenizer")
    if parsed.vocab_size is not None and parsed.vocab_size < 1:
        parser.error("--vocab-size must be at least 1")
    return parsed


def inspect(
    prefix: str, vocab_size: int | None, info: TokenizerInfo | None
) -> tuple[dict[str, Any], np.ndarray]:
    """What is in one token file, and the lengths of its documents. ConfigError where it is damaged or holds a wrong id."""
    index = read_index(prefix)
    limit = vocab_size if vocab_size is not None else int(np.iinfo(index.dtype).max) + 1
    file = check_token_file(
        prefix, vocab_size=limit, tokenizer_digest=info.digest if info else None, scan_tokens=2**62
    )
    # Sequences begin where the marks say; a document without ids has none.
    sums = np.concatenate((np.zeros(1, np.int64), np.cumsum(index.lengths, dtype=np.int64)))
    lengths = np.diff(sums[index.documents])
    tokens = np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r")
    largest = max(
        int(tokens[start : start + _BLOCK].max()) for start in range(0, len(tokens), _BLOCK)
    )
    ended = None
    if info is not None and info.end_of_document is not None:
        last = sums[index.documents[1:]][lengths > 0] - 1
        ended = int((tokens[last] == info.end_of_document).sum())
    some = lengths[lengths > 0]
    quantiles = np.quantile(some, (0.01, 0.25, 0.5, 0.75, 0.99), method="lower")
    return {
        "prefix": prefix,
        "tokens": file.num_tokens,
        "documents": int((lengths > 0).sum()),
        "empty_documents": int((lengths == 0).sum()),
        "sequences": len(index.lengths),
        "dtype": file.dtype.name,
        "bytes": file.num_tokens * file.dtype.itemsize,
        "largest_id": largest,
        "ended_documents": ended,
        "length_mean": float(some.mean()),
        "length_min": int(some.min()),
        "length_max": int(some.max()),
        **{
            f"length_p{name}": int(value)
            for name, value in zip((1, 25, 50, 75, 99), quantiles, strict=True)
        },
    }, some


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(first, last, documents) of ranges of lengths, each twice as long as the one before."""
    powers = np.floor(np.log2(lengths)).astype(int)
    counts = np.bincount(powers)
    return [
        (1 << power, (2 << power) - 1, int(counts[power]))
        for power in range(int(powers.min()), len(counts))
    ]


def show(prefix: str, vocabulary: Vocabulary, count: int, characters: int) -> list[dict[str, Any]]:
    """The beginnings of `count` documents, evenly spaced from the first to the last."""
    index = read_index(prefix)
    sums = np.concatenate((np.zeros(1, np.int64), np.cumsum(index.lengths, dtype=np.int64)))
    tokens = np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r")
    last = len(index.documents) - 2
    found = []
    for document in sorted({round(place * last / max(1, count - 1)) for place in range(count)}):
        start, end = (int(sums[index.documents[at]]) for at in (document, document + 1))
        ids = [int(value) for value in tokens[start : min(end, start + 4 * characters)]]
        found.append(
            {
                "document": document,
                "tokens": end - start,
                "ids": ids[:16],
                "text": vocabulary.decode(ids)[:characters],
            }
        )
    return found


def picture(found: Sequence[tuple[str, np.ndarray]], path: Path) -> None:
    """Lengths of documents, one curve a file. ConfigError without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ConfigError(
            "--picture needs matplotlib: pip install 'megatron-kd[report]'"
        ) from error
    figure, axes = pyplot.subplots(figsize=(7, 4))
    edges = np.logspace(0, np.log10(max(int(lengths.max()) for _, lengths in found) + 1), 60)
    for prefix, lengths in found:
        axes.hist(lengths, bins=edges, histtype="step", label=prefix)
    axes.set(xscale="log", xlabel="tokens of a document", ylabel="documents")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    vocabulary, info = (None, None)
    if arguments.tokenizer:
        vocabulary, info = load_tokenizer(
            arguments.tokenizer, end_of_document=arguments.end_of_document
        )
    size = arguments.vocab_size or (info.vocab_size if info else None)
    found = [inspect(prefix, size, info) for prefix in arguments.prefixes]
    for summary, lengths in found:
        summary["histogram"] = histogram(lengths)
        if vocabulary is not None and arguments.show:
            summary["shown"] = show(
                summary["prefix"], vocabulary, arguments.show, arguments.characters
            )
    if arguments.picture:
        picture([(summary["prefix"], lengths) for summary, lengths in found], arguments.picture)
    return [summary for summary, _ in found]


def print_summary(summary: dict[str, Any]) -> None:
    for name, value in summary.items():
        if name in ("histogram", "shown") or value is None:
            continue
        print(
            f"{name:16} {value:,.1f}"
            if isinstance(value, float)
            else f"{name:16} {value:,}"
            if isinstance(value, int)
            else f"{name:16} {value}"
        )
    most = max(count for _, _, count in summary["histogram"])
    print("\ndocuments by length in tokens")
    for first, last, count in summary["histogram"]:
        print(f"{first:>10,} .. {last:<10,} {count:>10,} {'#' * round(_BARS * count / most)}")
    for shown in summary.get("shown", ()):
        print(
            f"\ndocument {shown['document']}, {shown['tokens']:,} tokens, ids {shown['ids']}\n{shown['text']!r}"
        )
    print()


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    try:
        found = run(parsed)
    except (ConfigError, OSError) as error:
        print(f"inspect_data: {error}", file=sys.stderr)
        return 1
    if parsed.json:
        print(json.dumps({"files": found}, indent=2))
    else:
        for summary in found:
            print_summary(summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
