"""Run benchmarks: common options, paired rounds, statistics, provenance and output."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_kd.config import ConfigError
from megatron_kd.storage.exit_codes import BAD_INPUT
from megatron_kd.storage.provenance import commit

Spread = dict[str, float]


def bench_parser(
    description: str | None, *, rounds: int, rounds_help: str
) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has.

    Args:
        description: Docstring of the program.
        rounds: Default of --rounds.
        rounds_help: Help of --rounds.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=rounds, help=rounds_help)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", help="also write JSON to this file")
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")


def add_run_file(parser: argparse.ArgumentParser) -> None:
    """Add --config for a benchmark of a run file, whose keys are further options."""
    parser.add_argument(
        "--config",
        required=True,
        help="run file; its keys can be overridden as --section.key value",
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add --threads."""
    parser.add_argument(
        "--threads", type=int, help="threads of torch on a CPU (default: as in the environment)"
    )


def run_benchmark(
    name: str,
    arguments: argparse.Namespace,
    measure: Callable[[], dict[str, Any]],
    format_table: Callable[[dict[str, Any]], str],
    *,
    rank: int = 0,
) -> int:
    """Measure and print the result as a table or as JSON on rank 0.

    Args:
        name: Name of the program, for error messages.
        arguments: The parsed options.
        measure: Returns the result.
        format_table: Formats the result.
        rank: Rank of this process.

    Returns:
        The exit code: 0, or 2 for bad input.
    """
    try:
        result = measure()
    except ConfigError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return BAD_INPUT
    if rank == 0:
        report(arguments, result, format_table)
    return 0


def report(
    arguments: argparse.Namespace,
    result: dict[str, Any],
    format_table: Callable[[dict[str, Any]], str],
) -> None:
    """Print a result as a table or as JSON, and write it to --output.

    Args:
        arguments: The parsed options.
        result: Content of the JSON.
        format_table: Formats the result.
    """
    text = json.dumps(result, indent=2)
    if arguments.output:
        Path(arguments.output).write_text(text + "\n", encoding="utf-8")
    print(text if arguments.json else format_table(result))


def time_rounds(
    tasks: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    barrier: Callable[[], object] = lambda: None,
    synchronize: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Time tasks in turn, round after round, so that a slow phase of the machine hits all of them.

    One more round comes first and is not counted.

    Args:
        tasks: Tasks by name.
        rounds: Number of counted rounds.
        barrier: Waits for all ranks, before each task.
        synchronize: Waits for the device, after each task.

    Returns:
        Seconds of each round, by name.

    Collectives:
        Those of `barrier` and of the tasks.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for counted in [False] + [True] * rounds:
        for name, task in tasks.items():
            barrier()
            start = time.perf_counter()
            task()
            synchronize()
            if counted:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: Sequence[float]) -> Spread:
    """Return median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def quartiles(values: Sequence[float]) -> Spread:
    """Return the median and the other two quartiles."""
    quarters = statistics.quantiles(values, n=4)
    return {
        "median": statistics.median(values),
        "quarter": quarters[0],
        "three_quarters": quarters[2],
    }


def paired_ratios(numerators: Sequence[float], *denominators: Sequence[float]) -> list[float]:
    """Divide the values of each round by the sum of the denominators' values in that round."""
    sums = [sum(values) for values in zip(*denominators, strict=True)]
    return [value / total for value, total in zip(numerators, sums, strict=True)]


def provenance(*packages: str) -> dict[str, Any]:
    """Return the commit and the versions of Python and of some packages."""
    versions = {name: version(name) for name in packages}
    return {"commit": commit(), "versions": {"python": platform.python_version(), **versions}}


def device_name(on_gpu: bool) -> str:
    """Return the name of the GPU, or the kind of CPU and its threads."""
    import torch

    if on_gpu:
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads a rank"


def format_ms(seconds: Spread) -> str:
    """Format a spread of seconds in milliseconds."""
    low, middle, high = (seconds[key] * 1e3 for key in ("min", "median", "max"))
    return f"{middle:9.1f} ms   ({low:.1f} .. {high:.1f})"
