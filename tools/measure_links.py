"""Measure all-reduce, memory and logits bandwidth: the input of `tools/plan.py calibrate`.

    torchrun --nproc-per-node 2 tools/measure_links.py --json

All ranks measure at the same time, as they work in a run. Rank 0 prints:

    latency            seconds of the smallest all-reduce over all ranks
    intra_bandwidth    bytes/s that one rank sends in a large all-reduce (in a ring of T ranks each
                       sends 2 (T - 1) / T of the tensor)
    memory_bandwidth   bytes/s of an addition in memory
    row_bandwidth      bytes/s of logits in one pass that subtracts, exponentiates and sums
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_kd.config import ConfigError, ParallelSection
from megatron_kd.parallel.world import world_from_environment
from megatron_kd.storage.exit_codes import BAD_INPUT, FINISHED

if TYPE_CHECKING:
    from megatron_kd.parallel.platform import Platform

_WARMUP_REPEATS = 3


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--mebibytes", type=float, default=4.0, help="size of the large all-reduce")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    try:
        rates = measure(arguments)
    except ConfigError as error:
        print(f"measure_links: error: {error}", file=sys.stderr)
        return BAD_INPUT
    if world_from_environment()[0] == 0:
        lines = [f"{name:18} {value}" for name, value in rates.items()]
        print(json.dumps(rates) if arguments.json else "\n".join(lines))
    return FINISHED


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all rates. Collective over the world."""
    import torch

    from megatron_kd.parallel.groups import start_groups, stop_groups
    from megatron_kd.parallel.platform import start_platform

    _, world_size, local_rank = world_from_environment()
    platform = start_platform(arguments.device, local_rank)
    start_groups(platform, ParallelSection(), timeout_seconds=300)
    links = _all_reduce_rates(arguments, platform, world_size)
    addend, result = (torch.zeros(2**24, device=platform.device) for _ in range(2))
    add_seconds = _seconds(lambda: result.add_(addend), arguments.repeats, platform)
    logits = torch.zeros(127, 8224, device=platform.device)  # a block of the head's chunk
    pass_seconds = _seconds(lambda: (logits - 1.0).exp_().sum(1), arguments.repeats, platform)
    stop_groups()
    return {
        "world": world_size,
        **links,
        "memory_bandwidth": 3 * 4 * result.numel() / add_seconds,
        "row_bandwidth": 4 * logits.numel() / pass_seconds,
        "device": torch.cuda.get_device_name()
        if platform.is_cuda
        else f"CPU, {torch.get_num_threads()} threads a rank",
    }


def _all_reduce_rates(
    arguments: argparse.Namespace, platform: Platform, world_size: int
) -> dict[str, float]:
    import torch
    import torch.distributed as dist

    if world_size == 1:
        return {"latency": 0.0, "intra_bandwidth": 1e12}
    small = torch.zeros(1, device=platform.device)
    large = torch.zeros(int(arguments.mebibytes * 2**18), device=platform.device)
    latency = _seconds(lambda: dist.all_reduce(small), arguments.repeats, platform)
    seconds = _seconds(lambda: dist.all_reduce(large), arguments.repeats, platform)
    sent_bytes = 2 * (world_size - 1) / world_size * large.numel() * 4
    return {"latency": latency, "intra_bandwidth": sent_bytes / max(seconds - latency, 1e-9)}


def _seconds(task: Callable[[], object], repeats: int, platform: Platform) -> float:
    """Return the median time of a task, after a barrier each time."""
    import torch
    import torch.distributed as dist

    seconds = []
    for _ in range(repeats + _WARMUP_REPEATS):
        dist.barrier()
        begin = time.perf_counter()
        task()
        if platform.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[_WARMUP_REPEATS:])


if __name__ == "__main__":
    sys.exit(main())
