"""What reading a teacher cache costs a training step: the step with the cache, and with the same targets in memory already.

    python tools/bench_loader.py --config run.toml                               # run file with teacher.source = "cached"
    torchrun --nproc-per-node 2 tools/bench_loader.py --config run.toml --parallel.tensor 2

Both are timed in one process, in turn, round after round; the ratio is formed within a round. Targets are read and decoded by a
thread, one step ahead: it needs a little of a CPU core beside the training process, and where every core is busy it takes that
from training. --threads says how many cores training may use.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from megatron_kd.config import ConfigError, RunConfig, load_config
from megatron_kd.parallel.world import world_from_environment
from megatron_kd.storage.provenance import commit


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; rank 0 prints."""
    arguments, rest = _parser().parse_known_args(argv)
    rank, _, local_rank = world_from_environment()
    try:
        config = load_config(
            ["--config", arguments.config, *rest, "--train.steps", str(arguments.rounds + 2)]
        )
        if not config.teacher.reads_cache:
            raise ConfigError(
                f'bench_loader needs a run with teacher.source = "cached", not "{config.teacher.source}"'
            )
        from megatron_kd.parallel.platform import start_platform

        start_platform(config.train.device, local_rank)
        result = measure(config, arguments)
    except ConfigError as error:
        print(f"bench_loader: error: {error}", file=sys.stderr)
        return 2
    if rank == 0:
        if arguments.output:
            Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(result, indent=2) if arguments.json else _table(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        required=True,
        help="run file; its keys can be overridden as --section.key value",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=40,
        help="measured steps of each; one more comes first and is not counted",
    )
    parser.add_argument(
        "--threads", type=int, help="threads of torch on a CPU; unset: as the environment says"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", help="also write JSON to this file")
    return parser


def measure(config: RunConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time both. Collective over the world."""
    from dataclasses import replace

    import torch
    import torch.distributed as dist

    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.teacher.teacher import Teacher
    from megatron_kd.train.build import build_run
    from megatron_kd.train.step import train_step

    class RememberedTeacher(Teacher):
        """Return targets of training steps that were read beforehand."""

        def __init__(self, targets: list[Any]) -> None:
            self._targets = targets

        def targets(self, microbatches: Any, *, step: int | None = None) -> Any:
            assert step is not None
            return self._targets[step]

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    cached, memory = build_run(config), build_run(config)
    size = config.batch.global_batch_size
    targets = [
        memory.teacher.targets(memory.train_data.microbatches(step * size), step=step)
        for step in range(config.train.steps)
    ]
    runs = {"cached": cached, "memory": replace(memory, teacher=RememberedTeacher(targets))}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for counted in [False] + [True] * arguments.rounds:
        for name, run in runs.items():
            dist.barrier()
            begin = time.perf_counter()
            train_step(run)
            if cached.groups.platform.is_cuda:
                torch.cuda.synchronize()
            if counted:
                times[name].append(time.perf_counter() - begin)
    threads = torch.get_num_threads()
    stop_groups()
    tokens = config.batch.global_batch_size * config.batch.sequence_length
    return {
        "commit": commit(),
        "machine": f"{platform.machine()}, {threads} threads a rank",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rounds": arguments.rounds,
        "tokens_per_second": tokens / statistics.median(times["cached"]),
        "seconds": {name: _spread(values) for name, values in times.items()},
        "cached / memory": _spread(
            [a / b for a, b in zip(times["cached"], times["memory"], strict=True)]
        ),
    }


def _spread(values: list[float]) -> dict[str, float]:
    quarters = statistics.quantiles(values, n=4)
    return {
        "median": statistics.median(values),
        "quarter": quarters[0],
        "three_quarters": quarters[2],
    }


def _table(result: dict[str, Any]) -> str:
    ratio, seconds = result["cached / memory"], result["seconds"]
    return "\n".join(
        [
            f"commit {result['commit']}, {result['machine']}, {result['rounds']} steps, {result['tokens_per_second']:,.0f} tokens/s",
            *(f"{name:16}{spread['median'] * 1e3:9.2f} ms" for name, spread in seconds.items()),
            f"{'cached / memory':16}{ratio['median']:9.4f}     (half of them {ratio['quarter']:.4f} .. {ratio['three_quarters']:.4f})",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
