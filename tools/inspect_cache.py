"""Look into a teacher cache, check it, repair it, or make several into one.

    python tools/inspect_cache.py stats cache/ [--samples 1000] [--picture kept.png] [--json]
    python tools/inspect_cache.py verify cache/ [--json]                 # reads every byte: structure, digests, checksums
    python tools/inspect_cache.py repair cache/                          # removes bad shards; run tools/cache_teacher.py to redo them
    python tools/inspect_cache.py merge first/ second/ --output all/

Exit codes: 0 sound, 1 something is wrong with the cache, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_kd.cache import CacheError, CacheReader
from megatron_kd.cache.verify import discard, merge, statistics, verify


def main() -> int:
    """Run one of the commands."""
    arguments = _parser().parse_args()
    try:
        return int(arguments.run(arguments))
    except (CacheError, OSError) as error:
        print(f"inspect_cache: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="stats | verify | repair | merge")
    stats = commands.add_parser("stats", help="bytes per token, kept entries and mass, entropy")
    stats.add_argument("cache", type=Path)
    stats.add_argument("--samples", type=int, help="look at this many samples; unset: all")
    stats.add_argument("--picture", type=Path, help="write the histogram of kept entries as a PNG (needs matplotlib)")
    stats.add_argument("--json", action="store_true", help="print JSON")
    stats.set_defaults(run=_stats)
    check = commands.add_parser("verify", help="read every byte and say what is wrong")
    check.add_argument("cache", type=Path)
    check.add_argument("--json", action="store_true", help="print JSON")
    check.set_defaults(run=_verify)
    repair = commands.add_parser("repair", help="remove bad shards so that they are written again")
    repair.add_argument("cache", type=Path)
    repair.set_defaults(run=_repair)
    join = commands.add_parser("merge", help="gather the shards of several caches of one identity")
    join.add_argument("caches", type=Path, nargs="+")
    join.add_argument("--output", type=Path, required=True)
    join.set_defaults(run=_merge)
    return parser


def _stats(arguments: argparse.Namespace) -> int:
    reader = CacheReader(arguments.cache)
    found = statistics(reader, arguments.samples)
    summary = found.summary()
    if arguments.picture:
        _picture(found.kept, arguments.picture)
    if arguments.json:
        print(json.dumps({"identity": asdict(reader.identity), **summary, "kept": found.kept}, indent=2))
        return 0
    for name, value in asdict(reader.identity).items():
        print(f"{name:20} {value}")
    print(f"{'shards':20} {len(reader.shards)}")
    for name, value in summary.items():
        print(f"{name:20} {value:,.4g}" if isinstance(value, float) else f"{name:20} {value:,}")
    print("\ntokens by number of kept entries")
    for line in _histogram(found.kept):
        print(line)
    return 0


def _histogram(kept: list[int], lines: int = 16, width: int = 50) -> list[str]:
    """Bars of equal ranges of entries."""
    size = -(-len(kept) // lines)
    bins = [sum(kept[start : start + size]) for start in range(0, len(kept), size)]
    most = max([*bins, 1])
    return [
        f"{n * size:4}..{min((n + 1) * size, len(kept)) - 1:<4} {'#' * round(width * count / most)} {count:,}"
        for n, count in enumerate(bins)
    ]


def _picture(kept: list[int], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    axes.bar(range(len(kept)), kept, width=1.0)
    axes.set_xlabel("kept entries of a token")
    axes.set_ylabel("tokens")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _verify(arguments: argparse.Namespace) -> int:
    problems, strays = verify(arguments.cache)
    if arguments.json:
        print(json.dumps({"problems": problems, "unfinished": strays}, indent=2))
        return 1 if problems else 0
    for problem in problems.values():
        print(problem)
    for stray in strays:
        print(f"{stray}: not finished, not part of the cache")
    print(
        f"{arguments.cache}: {len(problems)} bad shards"
        if problems
        else f"{arguments.cache}: sound, {len(CacheReader(arguments.cache)):,} samples"
    )
    return 1 if problems else 0


def _repair(arguments: argparse.Namespace) -> int:
    problems, strays = verify(arguments.cache)
    for shard, problem in problems.items():
        if shard.endswith(".json"):
            print(f"inspect_cache: error: {problem}: this file cannot be made again from the rest", file=sys.stderr)
            return 1
        print(f"removed: {problem}")
        discard(arguments.cache, shard)
    for stray in strays:
        (arguments.cache / stray).unlink()
        print(f"removed: {stray}, not finished")
    print(
        f"{len(problems)} shards to write again: run the tools/cache_teacher.py command that made them"
        if problems
        else "nothing to write again"
    )
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    count = merge(arguments.caches, arguments.output)
    print(f"{arguments.output}: {count} shards added, {len(CacheReader(arguments.output)):,} samples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
