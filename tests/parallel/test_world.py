"""Who a process is, by the variables of its launcher."""

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
PLACE = {"MASTER_ADDR": "node1", "MASTER_PORT": "20050"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "2"}


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, (0, 1, 0)),
        (TORCHRUN, (3, 4, 2)),
        ({**SRUN, **PLACE}, (5, 8, 1)),
        ({**SRUN, **PLACE, **TORCHRUN}, (3, 4, 2)),  # torchrun, which srun started
        (
            {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"},
            (0, 1, 0),
        ),
        (
            {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"},
            (0, 1, 0),
        ),  # a batch script
        (
            {**SRUN, "SLURM_STEP_ID": str(0xFFFFFFFB)},
            (0, 1, 0),
        ),  # a batch script, of later releases
        ({**SRUN, "SLURM_STEP_ID": str(0xFFFFFFFA)}, (0, 1, 0)),  # salloc's shell
    ],
)
def test_launchers(
    variables: dict[str, str], wanted: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in {*SRUN, *PLACE, *TORCHRUN, "SLURM_NTASKS"}:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert world_from_environment() == wanted


def test_tasks_that_cannot_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PLACE, *TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="MASTER_ADDR and MASTER_PORT"):
        world_from_environment()
