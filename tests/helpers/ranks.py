"""Run a function on several gloo ranks, each in a process of its own, with a deadline.

Processes are forked from a server that has imported torch, megatron-core and the training loop and
has done nothing else. Starting a rank so takes a tenth of a second in place of three.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

# Settings that a library reads when it is imported, which the server did for all ranks.
PRELOADED = "tests.helpers.preload"


class RankFailed(AssertionError):  # noqa: N818  named in many tests
    """A rank raised or the deadline passed; the message holds its traceback."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240.0
) -> list[Any]:
    """Call `function(rendezvous, *args)` on fresh processes and return their values in rank order.

    RANK, WORLD_SIZE and LOCAL_RANK are set as torchrun does, and the environment of the caller is
    passed on. `rendezvous` is a file:// address for init_process_group. Values must be picklable.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    with tempfile.TemporaryDirectory() as folder:
        results = context.SimpleQueue()
        environment = dict(os.environ)
        arguments = (environment, function, f"file://{folder}/rendezvous", results, args)
        workers = [
            context.Process(target=_work, args=(rank, world_size, *arguments))
            for rank in range(world_size)
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
    values: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(values) < world_size:
        if results.empty():
            if time.monotonic() > deadline:
                missing = sorted(set(range(world_size)) - set(values))
                raise RankFailed(f"ranks {missing} did not finish within {timeout:.0f} s")
            dead = {
                rank: worker.exitcode
                for rank, worker in enumerate(workers)
                if worker.exitcode not in (None, 0) and rank not in values
            }
            if dead and results.empty():
                raise RankFailed(f"ranks died with exit codes {dead}")
            time.sleep(0.02)
            continue
        rank, value, error = results.get()
        if error is not None:
            raise RankFailed(f"rank {rank}:\n{error}")
        values[rank] = pickle.loads(value)
    return [values[rank] for rank in range(world_size)]


def _work(  # noqa: PLR0913  the arguments of a process
    rank: int,
    world_size: int,
    environment: dict[str, str],
    function: Callable[..., Any],
    rendezvous: str,
    results: Any,
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    try:
        # Pickled here: torch's own way hands over file descriptors, which this process would have
        # to outlive.
        results.put((rank, pickle.dumps(function(rendezvous, *args)), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        # Peers may wait in a collective for this rank: let the parent read the traceback and stop
        # them.
        time.sleep(5)
        raise SystemExit(1) from None
