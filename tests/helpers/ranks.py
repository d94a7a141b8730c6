"""Run a function on several gloo ranks: spawned processes, a rendezvous file, a deadline, and the first traceback shown."""

from __future__ import annotations

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from megatron_kd.parallel.platform import use_cpu


class RankFailed(AssertionError):
    """A rank raised or the deadline passed; the message holds its traceback."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240.0
) -> list[Any]:
    """`function(rendezvous, *args)` on `world_size` fresh processes; what each returned (picklable), in rank order.

    RANK, WORLD_SIZE and LOCAL_RANK are set as torchrun does; `rendezvous` is a file:// address for init_process_group.
    """
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results = context.SimpleQueue()
        arguments = (function, f"file://{folder}/rendezvous", world_size, results, args)
        workers = [
            context.Process(target=_work, args=(rank, *arguments)) for rank in range(world_size)
        ]
        for worker in workers:
            worker.start()
        try:
            return _collect(workers, results, world_size, timeout)
        finally:
            for worker in workers:
                if worker.is_alive():
                    worker.kill()
                worker.join()


def _collect(workers: list[Any], results: Any, world_size: int, timeout: float) -> list[Any]:
    found: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(found) < world_size:
        if results.empty():
            if time.monotonic() > deadline:
                raise RankFailed(
                    f"ranks {sorted(set(range(world_size)) - set(found))} did not finish within {timeout:.0f} s"
                )
            dead = [
                rank
                for rank, worker in enumerate(workers)
                if worker.exitcode not in (None, 0) and rank not in found
            ]
            if dead and results.empty():
                raise RankFailed(
                    f"ranks {dead} died with exit code {[workers[rank].exitcode for rank in dead]}"
                )
            time.sleep(0.02)
            continue
        rank, value, error = results.get()
        if error is not None:
            raise RankFailed(f"rank {rank}:\n{error}")
        found[rank] = pickle.loads(value)
    return [found[rank] for rank in range(world_size)]


def _work(
    rank: int,
    function: Callable[..., Any],
    rendezvous: str,
    world_size: int,
    results: Any,
    args: tuple[Any, ...],
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    use_cpu()
    try:
        # Pickled here: torch's own way hands over file descriptors, which this process would have to outlive.
        results.put((rank, pickle.dumps(function(rendezvous, *args)), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        # Peers may wait in a collective for this rank: let the parent read the traceback and stop them.
        time.sleep(5)
        raise SystemExit(1) from None
