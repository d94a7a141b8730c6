"""Read a process's rank from the variables of its launcher."""

from __future__ import annotations

import pytest

from megatron_kd.config import ConfigError
from megatron_kd.parallel.world import world_from_environment

SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "2",
}
SRUN_ALONE = {
    **SRUN,
    "SLURM_PROCID": "0",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_LOCALID": "0",
}
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
LATER_BATCH_SCRIPT = {**SRUN, "SLURM_STEP_ID": str(0xFFFFFFFB)}
SALLOC_SHELL = {**SRUN, "SLURM_STEP_ID": str(0xFFFFFFFA)}
MEETING_POINT = {"MASTER_ADDR": "node1", "MASTER_PORT": "20050"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "2"}


@pytest.mark.parametrize(
    ("variables", "world"),
    [
        ({}, (0, 1, 0)),
        (TORCHRUN, (3, 4, 2)),
        ({**SRUN, **MEETING_POINT}, (5, 8, 1)),
        ({**SRUN, **MEETING_POINT, **TORCHRUN}, (3, 4, 2)),  # torchrun, started by srun
        (SRUN_ALONE, (0, 1, 0)),
        (BATCH_SCRIPT, (0, 1, 0)),
        (LATER_BATCH_SCRIPT, (0, 1, 0)),
        (SALLOC_SHELL, (0, 1, 0)),
    ],
)
def test_launchers(
    variables: dict[str, str], world: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in {*SRUN, *MEETING_POINT, *TORCHRUN, "SLURM_NTASKS"}:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert world_from_environment() == world


def test_tasks_that_cannot_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*MEETING_POINT, *TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="MASTER_ADDR and MASTER_PORT"):
        world_from_environment()
