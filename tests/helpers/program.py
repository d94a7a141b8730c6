"""The program started as a cluster does it: one process a rank, no launcher that stops the others or changes their exit codes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start_ranks(
    world_size: int, arguments: list[str], *, module: str = "megatron_kd.pretrain"
) -> list[subprocess.Popen[str]]:
    """`python -m module *arguments` on each rank; stderr is piped."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(world_size),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]


def finish_ranks(
    workers: list[subprocess.Popen[str]], *, timeout: float = 120
) -> list[tuple[int, str]]:
    """Exit code and stderr of each; all are gone afterwards, whatever happens."""
    try:
        return [(each.communicate(timeout=timeout)[1], each.returncode)[::-1] for each in workers]
    finally:
        for each in workers:
            each.kill()
            each.wait()
            if each.stderr is not None:
                each.stderr.close()
