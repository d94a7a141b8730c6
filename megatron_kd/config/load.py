"""Load a run from program arguments.

There are two sources: the run file (`--config run.toml`) and dotted overrides
(`--section.key value`), which win. Values never come from environment variables or .env files, so
that the file and the command line describe a run completely.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from megatron_kd.config.arguments import USAGE, decode_overrides, print_help, split_arguments
from megatron_kd.config.dump import dump_toml
from megatron_kd.config.errors import ConfigError
from megatron_kd.config.run_config import RunConfig
from megatron_kd.config.run_file import read_run_file
from megatron_kd.config.validation import validate

_PROGRAM = "python -m megatron_kd.pretrain"


def load_config(argv: Sequence[str], *, prog: str = _PROGRAM) -> RunConfig:
    """Return the run that program arguments describe: the run file with overrides on top.

    `--help` prints every key and exits with status 0.

    Args:
        argv: program arguments, without the program's name.
        prog: name of the program in messages.

    Raises:
        ConfigError: with one line per problem: an argument that is no override, a run file that
            cannot be read, an unknown or missing key, a value of the wrong type or out of range,
            or values that do not fit together.
    """
    if "--help" in argv or "-h" in argv:
        print_help(prog)
    arguments = split_arguments(argv)
    overrides = decode_overrides(arguments.texts, prog)
    path = arguments.path
    values, notices = ({}, []) if path is None else read_run_file(path)
    if path is None and not overrides:
        raise ConfigError(f"no run file: start with {prog} {USAGE} (--help lists every key)")
    config = validate(values, overrides, path)
    dump_toml(config)  # Refuses a run whose values a run file cannot hold.
    _report([*notices, *arguments.notices])
    return config


def _report(notices: Sequence[str]) -> None:
    """Print notices to stderr, in a distributed run on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        for notice in notices:
            print(f"megatron_kd: notice: {notice}", file=sys.stderr, flush=True)
