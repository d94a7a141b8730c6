"""What the preprocessing tools share at the command line: a bar, exit codes, and the last word."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_kd.config import ConfigError
from megatron_kd.data.preparation.pieces import PieceNote

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def parse_holdout(text: str) -> tuple[str, float]:
    """NAME=FRACTION, for argparse."""
    name, _, fraction = text.partition("=")
    try:
        value = float(fraction)
    except ValueError:
        value = 0.0
    if not name or os.sep in name or not 0 < value < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=FRACTION with a fraction in (0, 1), such as valid=0.05"
        )
    return name, value


class Progress:
    """A bar in bytes of input with MB/s, tokens/s and the time left; nothing where stderr is not a terminal."""

    def __init__(self, total: int) -> None:
        self.tokens = self.kept = self.made_bytes = 0
        self._started = time.monotonic()
        self._bar = tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty())

    def __call__(self, note: PieceNote, kept: bool) -> None:
        self.kept += kept
        if kept and not self._bar.disable:
            self._bar.initial += (
                note.size
            )  # what an earlier run made says nothing about this one's speed
        elif not kept:
            self.tokens += sum(note.tokens)
            self.made_bytes += sum(note.text_bytes)
        self._bar.set_postfix_str(
            f"{self.tokens / max(1e-9, time.monotonic() - self._started):,.0f} tokens/s",
            refresh=False,
        )
        self._bar.update(note.size)

    def summary(self) -> dict[str, Any]:
        self._bar.close()
        seconds = max(1e-9, time.monotonic() - self._started)
        return {
            "kept_pieces": self.kept,
            "seconds": round(seconds, 2),
            "megabytes_per_second": round(self.made_bytes / 1e6 / seconds, 2),
            "tokens_per_second": round(self.tokens / seconds),
        }


def check_outputs(
    parser: argparse.ArgumentParser, output: Path, holdout: Sequence[tuple[str, float]]
) -> None:
    """End the program where --output and --holdout do not fit together."""
    names = [output.name, *(name for name, _ in holdout)]
    if not output.name or len(set(names)) < len(names):
        parser.error("--output needs a name, and the names of --output and --holdout must differ")
    if sum(fraction for _, fraction in holdout) >= 1:
        parser.error("the fractions of --holdout must sum to less than 1")


def run_and_report(tool: str, unit: str, run: Callable[[], dict[str, Any]]) -> int:
    """Print the summary that `run` returns, or one sentence; the exit code."""

    def complain(message: object, code: int) -> int:
        print(f"{tool}: {message}", file=sys.stderr)
        return code

    try:
        summary = run()
    except (ConfigError, UnicodeDecodeError) as error:
        return complain(error, 2)
    except OSError as error:
        if error.errno in _NO_SPACE:
            return complain(
                f"no space is left for the output ({error.strerror}): free some and run the same command again",
                5,
            )
        return complain(error, 1)
    except KeyboardInterrupt:
        return complain(
            "interrupted: run the same command again to go on from the finished pieces", 130
        )
    print(json.dumps(summary, indent=2))
    left_out = summary.get("unreadable", 0) + summary.get("too_long", 0)
    if left_out:
        complain(
            f"{left_out} {unit} were left out, such as {summary['unreadable_documents'][0]}", 0
        )
    return 0
