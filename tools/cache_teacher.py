"""Run a frozen teacher once over token data and store its targets, for any number of students.

    python tools/cache_teacher.py --config run.toml --output cache/
    torchrun --nproc-per-node 8 tools/cache_teacher.py ... --parallel.tensor 2
    ... --workers 16 --worker $SLURM_ARRAY_TASK_ID      # one of 16 jobs on one cache

The run file is that of a student: [teacher] checkpoint, [data] train, [batch] sequence_length,
[distill] top_k, top_p, min_k or num_draws, and temperature decide what is stored. By default every
sample of one pass over data.train is stored, which serves students of any seed, order, batch size
and layout. Start it again with the same command after any interruption, with more or fewer
processes if you like: finished shards are kept, and the result is the same.

Exit codes: 0 finished, 2 bad input, 3 another process writes this cache, 5 the disk is full or not
writable.
"""

from __future__ import annotations

import argparse
import sys
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_kd.config import ConfigError, RunConfig, load_config
from megatron_kd.config.sections.teacher_section import TEACHER_SOURCES
from megatron_kd.parallel.world import world_from_environment
from megatron_kd.storage.exit_codes import BAD_INPUT, CACHE_IN_USE, WRITE_FAILED

if TYPE_CHECKING:
    from megatron_kd.parallel.platform import Platform


def main(argv: list[str] | None = None) -> int:
    """Parse, build the teacher and the data, extract."""
    arguments, overrides = _parser().parse_known_args(argv)
    try:
        config = load_config(
            ["--config", arguments.config, *_overrides(arguments, overrides), *overrides]
        )
        if not 0 <= arguments.worker < arguments.workers:
            raise ConfigError(
                f"--worker ({arguments.worker}) must be in [0, {arguments.workers}), the number "
                "of --workers"
            )
        return _extract(config, arguments)
    except ConfigError as error:
        print(f"cache_teacher: error: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        required=True,
        help="run file of a student; its keys can be overridden as --section.key value",
    )
    parser.add_argument("--output", required=True, type=Path, help="folder of the cache")
    parser.add_argument(
        "--value-encoding",
        choices=["quantized", "fp32"],
        default="quantized",
        help="fp32: 4 bytes a value, exact",
    )
    parser.add_argument(
        "--shard-samples", type=int, default=1024, help="samples per shard, the unit of resuming"
    )
    parser.add_argument(
        "--first-samples",
        type=int,
        help="store no more than this many samples; unset: one pass over the data",
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="jobs that write this cache together"
    )
    parser.add_argument("--worker", type=int, default=0, help="which of them this is")
    return parser


def _overrides(arguments: argparse.Namespace, overrides: list[str]) -> list[str]:
    """Return overrides of the run file for this job.

    They leave the student's own directory alone, and run its teacher in this process, whichever
    source it has in training.
    """
    directory = ["--run.directory", str(arguments.output / ".work")]
    if any(word.startswith("--teacher.source") for word in overrides):
        return directory
    try:
        source = (
            tomllib.loads(Path(arguments.config).read_text(encoding="utf-8"))
            .get("teacher", {})
            .get("source")
        )
    except (OSError, ValueError):
        source = None  # load_config reports what is wrong with it.
    traits = TEACHER_SOURCES.get(str(source))
    runs = traits is not None and traits.runs_in_job
    return directory + ([] if runs else ["--teacher.source", "online"])


def _extract(config: RunConfig, arguments: argparse.Namespace) -> int:
    from megatron_kd.parallel.platform import start_platform

    rank, _, local_rank = world_from_environment()
    platform = start_platform(config.train.device, local_rank)
    from megatron_kd.cache import CacheError, CacheInUse
    from megatron_kd.parallel.groups import stop_groups

    try:
        return _run(config, arguments, platform)
    except CacheInUse as error:
        print(f"cache_teacher: error: {error}", file=sys.stderr, flush=True)
        return CACHE_IN_USE
    except CacheError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        print(
            f"cache_teacher: stopped on rank {rank}: {error}: finished shards are kept; "
            "free space and start again",
            file=sys.stderr,
            flush=True,
        )
        return WRITE_FAILED
    finally:
        stop_groups()


def _run(config: RunConfig, arguments: argparse.Namespace, platform: Platform) -> int:
    from megatron_kd.parallel.groups import start_groups
    from megatron_kd.teacher.extract import (
        Extraction,
        ShardPlan,
        agree_on_finished,
        build_extraction,
        extract_shard,
        sole_writer,
    )
    from megatron_kd.telemetry.progress_bar import ProgressBar
    from megatron_kd.train.datasets import TokenFiles, token_dataset
    from megatron_kd.train.startup.input_checks import check_inputs

    inputs = check_inputs(config, world_size=world_from_environment()[1])
    groups = start_groups(platform, config.parallel, timeout_seconds=config.train.timeout_seconds)
    teacher, identity = build_extraction(
        config, inputs.teacher, groups, value_encoding=arguments.value_encoding
    )
    parts = token_dataset(config, inputs, TokenFiles("data.train", config.data.train), 1).prefixes
    plan = ShardPlan(parts, arguments.shard_samples, arguments.first_samples)
    worker = arguments.worker * groups.data_size + groups.data_rank
    workers = arguments.workers * groups.data_size
    writes = groups.is_last_stage and groups.tensor_rank == 0
    with sole_writer(arguments.output, worker, writes=writes):
        finished = agree_on_finished(arguments.output, plan, identity)
        shards = [
            shard for shard in range(worker, plan.num_shards, workers) if shard not in finished
        ]
        progress = ProgressBar("auto", steps=len(shards), enabled=writes and groups.data_rank == 0)
        progress.message(
            f"{plan.num_samples} samples in {plan.num_shards} shards, {len(finished)} finished; "
            f"this writer, {worker} of {workers}, has {len(shards)}"
        )
        extraction = Extraction(
            plan,
            arguments.output,
            identity,
            writes=writes,
            worker=worker,
            micro_batch_size=config.batch.micro_batch_size,
            num_microbatches=2 * config.parallel.pipeline if config.parallel.pipeline > 1 else 1,
            device=groups.platform.device,
        )
        begin, tokens = time.perf_counter(), 0
        for count, shard in enumerate(shards, start=1):
            tokens += extract_shard(teacher, extraction, shard)
            progress.update(count, tokens_per_second=tokens / (time.perf_counter() - begin))
        progress.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
