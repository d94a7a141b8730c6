"""Merge several Megatron token files into one, in the order given.

    python tools/merge_data.py data/part0 data/part1 --output data/train

The result appears under its names only when it is complete. Exit codes: 0 done, 1 a failure, 2 bad
input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_kd.config import ConfigError
from megatron_kd.data.preparation.merging import merge
from megatron_kd.storage.exit_codes import BAD_INPUT


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, merge the files and print the description of the result."""
    parsed = parse_arguments(arguments)
    try:
        description = merge(parsed.prefixes, parsed.output)
    except ConfigError as error:
        print(f"merge_data: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        print(f"merge_data: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"output": str(parsed.output), **description}, indent=2))
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
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


if __name__ == "__main__":
    sys.exit(main())
