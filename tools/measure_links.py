"""Bandwidth and latency of an all-reduce over all ranks, of the memory and of passes over logits: what tools/plan.py calibrate asks for.

    torchrun --nproc-per-node 2 tools/measure_links.py --json

All ranks measure at the same time, as they work in a run. Rank 0 prints seconds of the smallest all-reduce (latency), bytes/s that one
rank sends in a large one (a ring of T ranks sends 2 (T - 1) / T of the tensor each), bytes/s of an addition in memory, and bytes/s of
logits in one pass that subtracts, exponentiates and sums.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from megatron_kd.config import ConfigError, ParallelSection
from megatron_kd.parallel.world import world_from_environment


def main(argv: list[str] | None = None) -> int:
    """Measure; rank 0 prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--mebibytes", type=float, default=4.0, help="size of the large all-reduce")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    try:
        found = measure(arguments)
    except ConfigError as error:
        print(f"measure_links: error: {error}", file=sys.stderr)
        return 2
    if world_from_environment()[0] == 0:
        lines = [f"{name:18} {value}" for name, value in found.items()]
        print(json.dumps(found) if arguments.json else "\n".join(lines))
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Collective over the world."""
    import torch
    import torch.distributed as dist

    from megatron_kd.parallel.groups import start_groups, stop_groups
    from megatron_kd.parallel.platform import start_platform

    _, world, local_rank = world_from_environment()
    platform = start_platform(arguments.device, local_rank)
    start_groups(platform, ParallelSection(), timeout_seconds=300)

    def timed(task: Callable[[], object]) -> float:
        seconds = []
        for _ in range(arguments.repeats + 3):
            dist.barrier()
            begin = time.perf_counter()
            task()
            if platform.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds[3:])

    small = torch.zeros(1, device=platform.device)
    large = torch.zeros(int(arguments.mebibytes * 2**18), device=platform.device)
    left, right = (torch.zeros(2**24, device=platform.device) for _ in range(2))
    latency = timed(lambda: dist.all_reduce(small)) if world > 1 else 0.0
    whole = timed(lambda: dist.all_reduce(large)) if world > 1 else 0.0
    added = timed(lambda: left.add_(right))
    logits = torch.zeros(127, 8224, device=platform.device)  # a block of the head's chunk
    passed = timed(lambda: (logits - 1.0).exp_().sum(1))
    stop_groups()
    sent = 2 * (world - 1) / world * large.numel() * 4
    return {
        "world": world,
        "latency": latency,
        "intra_bandwidth": sent / max(whole - latency, 1e-9) if world > 1 else 1e12,
        "memory_bandwidth": 3 * 4 * left.numel() / added,
        "row_bandwidth": 4 * logits.numel() / passed,
        "device": torch.cuda.get_device_name()
        if platform.is_cuda
        else f"CPU, {torch.get_num_threads()} threads a rank",
    }


if __name__ == "__main__":
    sys.exit(main())
