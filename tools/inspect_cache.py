"""Show what a teacher cache holds, verify it, repair it, or merge several into one.

    python tools/inspect_cache.py stats cache/ [--samples 1000] [--picture kept.png] [--json]
    python tools/inspect_cache.py verify cache/ [--json]
    python tools/inspect_cache.py verify cache/ --recompute 32 --config run.toml
    python tools/inspect_cache.py repair cache/ [--config run.toml]
    python tools/inspect_cache.py merge first/ second/ --output all/

verify reads every byte: structure, digests, checksums. With --recompute it compares 32 random
samples with the live teacher; that runs under torchrun too, in any layout. repair removes bad
shards; with the run file it writes them again. The run file is that of tools/cache_teacher.py; its
keys can be overridden as --section.key value.

Exit codes: 0 intact, 1 something is wrong with the cache, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_kd.cache import CacheError, CacheReader
from megatron_kd.cache.verify import merge, remove_shard, statistics, verify
from megatron_kd.config import ConfigError, RunConfig, load_config
from megatron_kd.parallel.world import world_from_environment
from megatron_kd.storage.exit_codes import BAD_INPUT

if TYPE_CHECKING:
    from megatron_kd.parallel.groups import Groups
    from megatron_kd.teacher.recheck import Recheck
    from megatron_kd.train.startup.input_checks import Inputs


def main(argv: list[str] | None = None) -> int:
    """Run one of the commands."""
    parser = _parser()
    arguments, arguments.overrides = parser.parse_known_args(argv)
    if arguments.overrides and not getattr(arguments, "config", None):
        parser.error(f"unknown arguments {' '.join(arguments.overrides)}")
    try:
        return int(arguments.run(arguments))
    except ConfigError as error:
        print(f"inspect_cache: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except (CacheError, OSError) as error:
        print(f"inspect_cache: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="stats | verify | repair | merge")
    stats = commands.add_parser("stats", help="bytes per token, kept entries and mass, entropy")
    stats.add_argument("cache", type=Path)
    stats.add_argument("--samples", type=int, help="read this many samples; unset: all")
    stats.add_argument(
        "--picture",
        type=Path,
        help="write the histogram of kept entries as a PNG (needs matplotlib)",
    )
    stats.add_argument("--json", action="store_true", help="print JSON")
    stats.set_defaults(run=_stats)
    check = commands.add_parser("verify", help="read every byte and report what is wrong")
    check.add_argument("cache", type=Path)
    check.add_argument("--json", action="store_true", help="print JSON")
    check.add_argument(
        "--recompute",
        type=int,
        default=0,
        metavar="N",
        help="compare N random samples with the live teacher of --config",
    )
    check.add_argument("--seed", type=int, default=0, help="of the choice of these samples")
    check.add_argument("--config", help="run file that the cache was made with")
    check.set_defaults(run=_verify)
    repair = commands.add_parser("repair", help="remove bad shards so that they are written again")
    repair.add_argument("cache", type=Path)
    repair.add_argument(
        "--config", help="run file that the cache was made with: bad shards are written again"
    )
    repair.add_argument(
        "--shard-samples", type=int, default=1024, help="as tools/cache_teacher.py was given"
    )
    repair.set_defaults(run=_repair)
    join = commands.add_parser("merge", help="gather the shards of several caches of one identity")
    join.add_argument("caches", type=Path, nargs="+")
    join.add_argument("--output", type=Path, required=True)
    join.set_defaults(run=_merge)
    return parser


def _stats(arguments: argparse.Namespace) -> int:
    reader = CacheReader(arguments.cache)
    sums = statistics(reader, arguments.samples)
    summary = sums.summary()
    if arguments.picture:
        _picture(sums.kept, arguments.picture)
    if arguments.json:
        print(
            json.dumps(
                {"identity": asdict(reader.identity), **summary, "kept": sums.kept}, indent=2
            )
        )
        return 0
    for name, value in asdict(reader.identity).items():
        print(f"{name:20} {value}")
    print(f"{'shards':20} {len(reader.shards)}")
    steps = [
        step
        for shard in reader.shards
        for step in (shard.info.step, shard.info.last_step)
        if step is not None
    ]
    if steps:
        print(f"{'training steps':20} {min(steps)} to {max(steps)}")
    for name, value in summary.items():
        print(f"{name:20} {value:,.4g}" if isinstance(value, float) else f"{name:20} {value:,}")
    print("\ntokens by number of kept entries")
    for line in _histogram(sums.kept):
        print(line)
    return 0


def _histogram(kept: list[int], lines: int = 16, width: int = 50) -> list[str]:
    """Return the lines of a bar chart of equal ranges of entries."""
    size = -(-len(kept) // lines)
    bins = [sum(kept[start : start + size]) for start in range(0, len(kept), size)]
    most = max([*bins, 1])
    return [
        (
            f"{n * size:4}..{min((n + 1) * size, len(kept)) - 1:<4} "
            f"{'#' * round(width * count / most)} {count:,}"
        )
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
    if arguments.recompute:
        return _recompute(arguments)
    problems, unfinished = verify(arguments.cache)
    if arguments.json:
        print(json.dumps({"problems": problems, "unfinished": unfinished}, indent=2))
        return 1 if problems else 0
    for problem in problems.values():
        print(problem)
    for name in unfinished:
        print(f"{name}: not finished, not part of the cache")
    print(
        f"{arguments.cache}: {len(problems)} bad shards"
        if problems
        else f"{arguments.cache}: intact, {len(CacheReader(arguments.cache)):,} samples"
    )
    return 1 if problems else 0


def _recompute(arguments: argparse.Namespace) -> int:
    """Compare random samples with the live teacher. Collective over the world of torchrun."""
    if not arguments.config:
        raise ConfigError("--recompute needs --config: the run file that the cache was made with")
    work = ["--run.directory", str(arguments.cache / ".work"), "--teacher.source", "online"]
    config = load_config(["--config", arguments.config, *work, *arguments.overrides])
    _, world_size, local_rank = world_from_environment()
    from megatron_kd.parallel.platform import start_platform

    platform = start_platform(config.train.device, local_rank)
    from megatron_kd.parallel.groups import start_groups, stop_groups
    from megatron_kd.train.startup.input_checks import check_inputs

    inputs = check_inputs(config, world_size=world_size)
    groups = start_groups(platform, config.parallel, timeout_seconds=config.train.timeout_seconds)
    try:
        result = _compare_samples(arguments, config, inputs, groups)
    finally:
        stop_groups()
    if result is None:
        return 0
    if groups.tensor_rank == 0 and groups.data_rank == 0:
        _print_comparison(arguments, result)
    return 1 if result.wrong or not result.distances else 0


def _compare_samples(
    arguments: argparse.Namespace, config: RunConfig, inputs: Inputs, groups: Groups
) -> Recheck | None:
    from megatron_kd.teacher.extract import ShardPlan, build_extraction
    from megatron_kd.teacher.recheck import recheck
    from megatron_kd.train.datasets import TokenFiles, token_dataset

    encoding = CacheReader(arguments.cache).identity.value_encoding
    teacher, identity = build_extraction(config, inputs.teacher, groups, value_encoding=encoding)
    reader = CacheReader(arguments.cache, expect=identity)
    dataset = token_dataset(config, inputs, TokenFiles("data.train", config.data.train), 1)
    return recheck(
        teacher,
        reader,
        ShardPlan(dataset.prefixes, 1),
        samples=arguments.recompute,
        seed=arguments.seed,
        device=groups.platform.device,
    )


def _print_comparison(arguments: argparse.Namespace, result: Recheck) -> None:
    from megatron_kd.teacher.recheck import TOLERANCE

    if arguments.json:
        content = {
            "distances": result.distances,
            "missing": result.missing,
            "tolerance": TOLERANCE,
        }
        print(json.dumps(content, indent=2))
        return
    for sample, distance in result.wrong.items():
        print(
            f"sample {sample}: total variation {distance:.4f} from the teacher's distribution, "
            f"at most {TOLERANCE} expected"
        )
    mean = sum(result.distances.values()) / max(len(result.distances), 1)
    print(
        f"{arguments.cache}: {len(result.distances)} samples compared, {len(result.wrong)} wrong, "
        f"mean total variation {mean:.5f}; "
        f"{len(result.missing)} of the chosen are not in the cache"
    )


def _repair(arguments: argparse.Namespace) -> int:
    problems, unfinished = verify(arguments.cache)
    for shard, problem in problems.items():
        if shard.endswith(".json"):
            print(
                f"inspect_cache: error: {problem}: this file cannot be made again from the rest",
                file=sys.stderr,
            )
            return 1
        print(f"removed: {problem}")
        remove_shard(arguments.cache, shard)
    for name in unfinished:
        (arguments.cache / name).unlink()
        print(f"removed: {name}, not finished")
    if not problems:
        print("nothing to write again")
        return 0
    lost = [shard for shard in problems if not shard.startswith("shard-")]
    if lost:
        print(
            f"{', '.join(lost)}: not from tools/cache_teacher.py: merge the caches again, or let "
            "the teacher's training capture again"
        )
    if len(lost) == len(problems):
        return 1
    if not arguments.config:
        print(
            f"{len(problems) - len(lost)} shards to write again: run the tools/cache_teacher.py "
            "command that made them"
        )
        return 0
    program = [
        sys.executable,
        str(Path(__file__).with_name("cache_teacher.py")),
        "--config",
        arguments.config,
        "--output",
        str(arguments.cache),
    ]
    encoding = CacheReader(arguments.cache).identity.value_encoding
    options = [
        "--value-encoding",
        encoding,
        "--shard-samples",
        str(arguments.shard_samples),
        *arguments.overrides,
    ]
    return subprocess.run([*program, *options], check=False).returncode


def _merge(arguments: argparse.Namespace) -> int:
    count = merge(arguments.caches, arguments.output)
    print(
        f"{arguments.output}: {count} shards added, {len(CacheReader(arguments.output)):,} samples"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
