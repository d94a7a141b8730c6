r"""Train a SentencePiece tokenizer on text files.

    python tools/train_tokenizer.py --input corpus/ --pattern '*.py' --vocab-size 2000 \
        --output tokenizer.model

The model keeps text as it is: no normalisation, no added or removed spaces, newlines and tabs as
tokens, and bytes for characters outside the vocabulary, so that decoding gives back what was
encoded. The one exception is the character U+2581, which SentencePiece uses for a space.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_kd.config import ConfigError
from megatron_kd.data.preparation.tokenizer_training import TrainingRequest, train_tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, train the tokenizer and print a summary."""
    parsed = parse_arguments(arguments)
    start = time.monotonic()
    request = TrainingRequest(
        inputs=parsed.input,
        patterns=parsed.pattern,
        exclude=parsed.exclude,
        output=parsed.output,
        vocab_size=parsed.vocab_size,
        model_type=parsed.model_type,
        max_bytes=parsed.max_megabytes * 1e6,
        text_key=parsed.text_key,
        verbose=parsed.verbose,
    )
    try:
        summary = train_tokenizer(request)
    except (ConfigError, OSError) as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return 1
    summary["seconds"] = round(time.monotonic() - start, 1)
    print(json.dumps(summary, indent=2))
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Train a SentencePiece tokenizer (<unk>=0, <s>=1, </s>=2) on text files. "
        "The same input gives the same model."
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="text files, .jsonl files with a text key, or folders of them",
    )
    add(
        "--pattern",
        nargs="+",
        default=["*"],
        metavar="GLOB",
        help="names of the files to take from folders (all)",
    )
    add(
        "--exclude",
        nargs="+",
        default=[],
        metavar="GLOB",
        help="names of files and subfolders to leave out",
    )
    add("--text-key", default="text", help="key of the text in .jsonl lines (text)")
    add("--output", required=True, type=Path, metavar="FILE", help="where the .model file goes")
    _add_training_options(parser)
    return parser.parse_args(arguments)


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--vocab-size",
        type=int,
        required=True,
        help="number of ids, 256 bytes and 3 special ones included",
    )
    add(
        "--model-type",
        choices=("bpe", "unigram"),
        default="bpe",
        help="bpe (default) trains about ten times faster",
    )
    add(
        "--max-megabytes",
        type=float,
        default=6.0,
        help="text to train on at most (%(default)s); pieces of 0.25 MB are picked from all over "
        "the input",
    )
    add("--verbose", action="store_true", help="show SentencePiece's own messages")


if __name__ == "__main__":
    sys.exit(main())
