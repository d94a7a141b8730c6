"""Time a training step that reads a teacher cache, and one with the same targets in memory.

    python tools/bench_loader.py --config run.toml        # run file with teacher.source = "cached"
    torchrun --nproc-per-node 2 tools/bench_loader.py --config run.toml --parallel.tensor 2

Both are timed in one process, in turn, round after round; the ratio is formed within a round. A
thread reads and decodes targets one step ahead. It needs a little of a CPU core beside the training
process, and takes that from training if every core is busy. --threads sets how many cores training
may use.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from bench.harness import (
    add_run_file,
    add_threads,
    bench_parser,
    paired_ratios,
    provenance,
    quartiles,
    run_benchmark,
    time_rounds,
)

from megatron_kd.config import ConfigError, RunConfig, load_config
from megatron_kd.parallel.world import world_from_environment


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; rank 0 prints."""
    arguments, overrides = _parser().parse_known_args(argv)
    rank, _, local_rank = world_from_environment()

    def load_and_measure() -> dict[str, Any]:
        steps = ["--train.steps", str(arguments.rounds + 2)]
        config = load_config(["--config", arguments.config, *overrides, *steps])
        if not config.teacher.reads_cache:
            raise ConfigError(
                'bench_loader needs a run with teacher.source = "cached", '
                f'not "{config.teacher.source}"'
            )
        from megatron_kd.parallel.platform import start_platform

        start_platform(config.train.device, local_rank)
        return measure(config, arguments)

    return run_benchmark("bench_loader", arguments, load_and_measure, _table, rank=rank)


def _parser() -> argparse.ArgumentParser:
    parser = bench_parser(
        __doc__,
        rounds=40,
        rounds_help="measured steps of each; one more comes first and is not counted",
    )
    add_run_file(parser)
    add_threads(parser)
    return parser


def measure(config: RunConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time both kinds of step.

    Collectives:
        Over the world.
    """
    import torch
    import torch.distributed as dist

    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.train.build import build_run
    from megatron_kd.train.step import train_step

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    cached = build_run(config)
    in_memory = _run_with_targets_in_memory(config)
    on_gpu = cached.groups.platform.is_cuda
    seconds = time_rounds(
        {"cached": lambda: train_step(cached), "memory": lambda: train_step(in_memory)},
        arguments.rounds,
        barrier=dist.barrier,
        synchronize=torch.cuda.synchronize if on_gpu else lambda: None,
    )
    threads = torch.get_num_threads()
    stop_groups()
    tokens = config.batch.global_batch_size * config.batch.sequence_length
    return {
        **provenance("torch"),
        "machine": f"{platform.machine()}, {threads} threads a rank",
        "rounds": arguments.rounds,
        "tokens_per_second": tokens / statistics.median(seconds["cached"]),
        "seconds": {name: quartiles(values) for name, values in seconds.items()},
        "cached / memory": quartiles(paired_ratios(seconds["cached"], seconds["memory"])),
    }


def _run_with_targets_in_memory(config: RunConfig) -> Any:
    """Return a run of the config whose targets have all been read."""
    from dataclasses import replace

    from megatron_kd.teacher.teacher import Teacher
    from megatron_kd.train.build import build_run

    class RememberedTeacher(Teacher):
        """Return targets of training steps that were read beforehand."""

        def __init__(self, targets: list[Any]) -> None:
            self._targets = targets

        def targets(self, microbatches: Any, *, step: int | None = None) -> Any:
            """Return the targets of a step."""
            assert step is not None
            return self._targets[step]

    run, size = build_run(config), config.batch.global_batch_size
    targets = [
        run.teacher.targets(run.train_data.microbatches(step * size), step=step)
        for step in range(config.train.steps)
    ]
    return replace(run, teacher=RememberedTeacher(targets))


def _table(result: dict[str, Any]) -> str:
    ratio, seconds = result["cached / memory"], result["seconds"]
    half = f"(half of them {ratio['quarter']:.4f} .. {ratio['three_quarters']:.4f})"
    return "\n".join(
        [
            f"commit {result['commit']}, {result['machine']}, {result['rounds']} steps, "
            f"{result['tokens_per_second']:,.0f} tokens/s",
            *(f"{name:16}{times['median'] * 1e3:9.2f} ms" for name, times in seconds.items()),
            f"{'cached / memory':16}{ratio['median']:9.4f}     {half}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
