"""Start a program with one process a rank, without a launcher that stops ranks."""

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
    """Start `python -m module *arguments` on each rank with stderr piped."""
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
    """Return exit code and stderr of each rank. All have ended afterwards."""
    try:
        return [
            (worker.communicate(timeout=timeout)[1], worker.returncode)[::-1] for worker in workers
        ]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            if worker.stderr is not None:
                worker.stderr.close()
