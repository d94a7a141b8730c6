"""Inspect Megatron token files: counts, lengths, some documents as text, and a complete check.

    python tools/inspect_data.py data/train --tokenizer tokenizer.model --show 2
    python tools/inspect_data.py data/train data/valid --vocab-size 32000 --json

Reads every id. Exit codes: 0 valid, 1 a file is damaged or does not fit, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_kd.config import ConfigError
from megatron_kd.data.preparation.inspection import (
    draw_lengths,
    inspect_token_file,
    length_histogram,
    sample_documents,
)
from megatron_kd.data.tokenizer import load_tokenizer

_BAR_WIDTH = 50


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, inspect the files and print the summaries."""
    parsed = parse_arguments(arguments)
    try:
        summaries = run(parsed)
    except (ConfigError, OSError) as error:
        print(f"inspect_data: {error}", file=sys.stderr)
        return 1
    if parsed.json:
        print(json.dumps({"files": summaries}, indent=2))
    else:
        for summary in summaries:
            print_summary(summary)
    return 0


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the summary of each file."""
    vocabulary, info = (None, None)
    if arguments.tokenizer:
        vocabulary, info = load_tokenizer(
            arguments.tokenizer, end_of_document=arguments.end_of_document
        )
    vocab_size = arguments.vocab_size or (info.vocab_size if info else None)
    inspections = [inspect_token_file(prefix, vocab_size, info) for prefix in arguments.prefixes]
    summaries = []
    for inspection in inspections:
        summary = inspection.summary | {"histogram": length_histogram(inspection.lengths)}
        if vocabulary is not None and arguments.show:
            summary["shown"] = sample_documents(
                summary["prefix"], vocabulary, arguments.show, arguments.characters
            )
        summaries.append(summary)
    if arguments.picture:
        draw_lengths(inspections, arguments.picture)
    return summaries


def print_summary(summary: dict[str, Any]) -> None:
    """Print one file's summary as text."""
    for name, value in summary.items():
        if name in ("histogram", "shown") or value is None:
            continue
        number_format = (
            ",.1f" if isinstance(value, float) else "," if isinstance(value, int) else ""
        )
        print(f"{name:16} {value:{number_format}}")
    largest = max(count for _, _, count in summary["histogram"])
    print("\ndocuments by length in tokens")
    for first, last, count in summary["histogram"]:
        bar = "#" * round(_BAR_WIDTH * count / largest)
        print(f"{first:>10,} .. {last:<10,} {count:>10,} {bar}")
    for document in summary.get("shown", ()):
        print(
            f"\ndocument {document['document']}, {document['tokens']:,} tokens, "
            f"ids {document['ids']}\n{document['text']!r}"
        )
    print()


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("prefixes", nargs="+", metavar="PREFIX", help="token files, without .bin/.idx")
    add(
        "--tokenizer",
        metavar="PATH",
        help="check ids, and the tokenizer that the .json file names, against this one; decode "
        "with it",
    )
    add(
        "--end-of-document",
        metavar="TOKEN",
        help="token that ends documents, if it is not the tokenizer's own",
    )
    add(
        "--vocab-size",
        type=int,
        metavar="N",
        help="check ids against this many; unset: the tokenizer's",
    )
    _add_output_options(parser)
    parsed = parser.parse_args(arguments)
    if parsed.show and not parsed.tokenizer:
        parser.error("--show needs --tokenizer")
    if parsed.vocab_size is not None and parsed.vocab_size < 1:
        parser.error("--vocab-size must be at least 1")
    return parsed


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
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


if __name__ == "__main__":
    sys.exit(main())
