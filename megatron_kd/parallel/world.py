"""Who this process is, as its launcher says; known before torch is imported."""

from __future__ import annotations

import os


def world_from_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun sets them; a process started alone is a world of one."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
