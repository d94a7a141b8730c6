"""Make several Megatron token files into one, in the order given.

    python tools/merge_data.py data/part0 data/part1 --output data/train

The result appears under its names only when it is complete. Exit codes: 0 done, 1 a failure, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kd.config import ConfigError
from megatron_kd.data.preparation.publish import publish
from megatron_kd.data.token_file_checks import check_token_file
from megatron_kd.data.token_files import read_index, read_roles


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "prefixes", nargs="+", metavar="PREFIX", help="token files, without .bin/.idx"
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="PREFIX",
        help="the file to make; it must not exist",
    )
    return parser.parse_args(arguments)


def merged_description(prefixes: Sequence[str]) -> dict[str, Any]:
    """The .json beside the result: sums, largest id, and what must be the same of all. ConfigError where it is not."""
    found = []
    for prefix in prefixes:
        try:
            found.append(json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{prefix}.json cannot be read, so its tokenizer is not known ({error}): make {prefix} again"
            ) from error
    description: dict[str, Any] = {}
    for key in (
        "tokenizer_digest",
        "vocab_size",
        "end_of_document",
        "append_eod",
        "dtype",
        "packed_length",
    ):
        values = {json.dumps(one.get(key)) for one in found}
        if len(values) > 1:
            raise ConfigError(
                f"{' and '.join(prefixes)} differ in {key} ({', '.join(sorted(values))}): they cannot be one file"
            )
        description[key] = found[0].get(key)
    summed = ("bytes", "tokens", "documents", "conversations", "loss_tokens")
    description |= {key: sum(one.get(key, 0) for one in found) for key in summed}
    # Conversations have some of these, text has others.
    description = {key: value for key, value in description.items() if key in found[0]}
    return description | {
        "max_id": max(one["max_id"] for one in found),
        "merged_from": [str(Path(prefix).absolute()) for prefix in prefixes],
    }


def merge(prefixes: Sequence[str], output: Path) -> dict[str, Any]:
    """Write the result. ConfigError for damaged or unlike parts, or where the output is there already."""
    for ending in (".bin", ".idx", ".json"):
        if Path(f"{output}{ending}").exists():
            raise ConfigError(f"{output}{ending} is there already: choose another --output")
    description = merged_description(prefixes)
    lengths = []
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        for number, prefix in enumerate(prefixes):
            check_token_file(
                prefix,
                vocab_size=description["vocab_size"],
                tokenizer_digest=description["tokenizer_digest"],
            )
            index = read_index(prefix)
            if (np.diff(index.documents) > 1).any():
                raise ConfigError(
                    f"{prefix} has documents of several sequences, which this tool does not join"
                )
            # One length per mark; a mark that repeats stands for an empty document.
            documents = np.zeros(len(index.documents) - 1, "<i4")
            documents[np.diff(index.documents) == 1] = index.lengths
            lengths.append(
                output.with_name(f".{output.name}.lengths{number}.partial-{os.getpid()}")
            )
            documents.tofile(lengths[-1])
        roles = [Path(f"{prefix}.roles") for prefix in prefixes if read_roles(prefix) is not None]
        if len(roles) not in (0, len(prefixes)):
            raise ConfigError(
                f"some of {' and '.join(prefixes)} have a .roles file and others do not: they cannot be one file"
            )
        parts = [Path(f"{prefix}.bin") for prefix in prefixes]
        publish(output, np.dtype(description["dtype"]), parts, lengths, description, roles)
    finally:
        for path in lengths:
            path.unlink(missing_ok=True)
    return description


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    try:
        description = merge(parsed.prefixes, parsed.output)
    except ConfigError as error:
        print(f"merge_data: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"merge_data: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"output": str(parsed.output), **description}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
