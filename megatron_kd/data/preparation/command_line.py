"""Share what the preprocessing tools need at the command line: progress, exit codes, the report."""

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
from megatron_kd.data.preparation.jobs.job import PieceSummary

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def parse_holdout(text: str) -> tuple[str, float]:
    """Parse NAME=FRACTION for argparse."""
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


def parse_shard(text: str) -> tuple[int, int]:
    """Parse I/N for argparse."""
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        index, count = 0, 0
    if not 0 <= index < count:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 0 <= I < N, such as 0/4")
    return index, count


def parse_option(text: str) -> tuple[str, str]:
    """Parse NAME=VALUE for argparse."""
    name, separator, value = text.partition("=")
    if not name or not separator or "\n" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, such as account=project")
    return name, value


class PieceProgress:
    """Show a bar in bytes of input with MB/s, tokens/s and the remaining time.

    Nothing is shown if stderr is not a terminal.
    """

    def __init__(self, total: int) -> None:
        self._tokens = self._kept = self._bytes = 0
        self._start = time.monotonic()
        self._bar = tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty())

    def report(self, summary: PieceSummary, kept: bool) -> None:
        """Count a piece; `kept` if an earlier run had made it."""
        self._kept += kept
        if kept and not self._bar.disable:
            # The pieces of an earlier run do not count for the speed of this one.
            self._bar.initial += summary.size
        elif not kept:
            self._tokens += sum(summary.tokens)
            self._bytes += sum(summary.text_bytes)
        rate = self._tokens / self._seconds()
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update(summary.size)

    def close(self) -> dict[str, Any]:
        """Close the bar and return totals and rates."""
        self._bar.close()
        seconds = self._seconds()
        return {
            "kept_pieces": self._kept,
            "seconds": round(seconds, 2),
            "megabytes_per_second": round(self._bytes / 1e6 / seconds, 2),
            "tokens_per_second": round(self._tokens / seconds),
        }

    def _seconds(self) -> float:
        return max(1e-9, time.monotonic() - self._start)


def check_outputs(
    parser: argparse.ArgumentParser, output: Path, holdout: Sequence[tuple[str, float]]
) -> None:
    """End the program if --output and --holdout do not fit together."""
    names = [output.name, *(name for name, _ in holdout)]
    if not output.name or len(set(names)) < len(names):
        parser.error("--output needs a name, and the names of --output and --holdout must differ")
    if sum(fraction for _, fraction in holdout) >= 1:
        parser.error("the fractions of --holdout must sum to less than 1")


def run_and_report(tool: str, unit: str, run: Callable[[], dict[str, Any]]) -> int:
    """Run a tool, print its summary or an error message, and return the exit code.

    Args:
        tool: name of the tool.
        unit: what the tool counts, in the plural.
        run: returns the summary.
    """
    try:
        summary = run()
    except (ConfigError, UnicodeDecodeError) as error:
        return _fail(tool, error, 2)
    except OSError as error:
        if error.errno in _NO_SPACE:
            message = (
                f"no space is left for the output ({error.strerror}): "
                "free some and run the same command again"
            )
            return _fail(tool, message, 5)
        return _fail(tool, error, 1)
    except KeyboardInterrupt:
        message = "interrupted: run the same command again to go on from the finished pieces"
        return _fail(tool, message, 130)
    print(json.dumps(summary, indent=2))
    num_skipped = summary.get("unreadable", 0) + summary.get("too_long", 0)
    if num_skipped:
        example = summary["unreadable_documents"][0]
        _fail(tool, f"{num_skipped} {unit} were left out, such as {example}", 0)
    return 0


def _fail(tool: str, message: object, code: int) -> int:
    print(f"{tool}: {message}", file=sys.stderr)
    return code
