"""Read this process's rank from the variables of its launcher, before torch is imported."""

from __future__ import annotations

import os

from megatron_kd.config import ConfigError

# Slurm numbers the job steps that srun starts from 0. Higher numbers are batch scripts and the
# shells of salloc.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


def world_from_environment() -> tuple[int, int, int]:
    """Return (rank, world size, local rank) as torchrun sets them, or else as srun does.

    A process that was started alone is a world of one.

    Raises:
        ConfigError: srun started several processes and no variable says where they meet.
    """
    if "RANK" not in os.environ and _is_task_of_srun():
        rank, size, local_rank = (
            int(os.environ[name])
            for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        )
        if size > 1 and not (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
            raise ConfigError(
                f"srun started {size} processes, but MASTER_ADDR and MASTER_PORT do not say where "
                "they meet: export them before srun, as examples/slurm/run.sh does"
            )
        return rank, size, local_rank
    return (
        int(os.environ.get("RANK", 0)),
        int(os.environ.get("WORLD_SIZE", 1)),
        int(os.environ.get("LOCAL_RANK", 0)),
    )


def _is_task_of_srun() -> bool:
    """Return True for a task that srun started.

    A batch script has SLURM_PROCID too, without being a task.
    """
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID")
    return (
        all(os.environ.get(name, "").isdigit() for name in names)
        and int(os.environ["SLURM_STEP_ID"]) < _FIRST_SPECIAL_STEP
    )
