"""Submit a job to Slurm through datatrove."""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_kd.config import ConfigError
from megatron_kd.data.preparation.jobs.execution import join_pieces, locked, make_share
from megatron_kd.data.preparation.jobs.job import PieceSummary
from megatron_kd.data.preparation.jobs.job_plan import JobPlan


@dataclass(frozen=True)
class SlurmOptions:
    """State how to submit a job.

    Attributes:
        tasks: array tasks at most, of one core each.
        partition: partition.
        time_limit: time limit of a task.
        logs: folder of the logs.
        sbatch: further sbatch options by name.
    """

    tasks: int
    partition: str
    time_limit: str
    logs: Path
    sbatch: dict[str, str] = field(default_factory=dict)


def submit(plan: JobPlan, options: SlurmOptions) -> list[str]:
    """Submit an array of tasks that make pieces, and one task that joins them afterwards.

    Returns:
        The two job ids.

    Raises:
        ConfigError: datatrove is not installed, or sbatch is missing or refuses.
    """
    try:
        from datatrove.executor import SlurmPipelineExecutor
    except ImportError as error:
        raise ConfigError(
            "--executor slurm needs the package datatrove: pip install 'megatron-kd[preprocess]'"
        ) from error
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "--executor slurm needs Slurm's sbatch command on this machine: "
            "run it on a login node, or leave it out"
        )
    sbatch = dict(options.sbatch)
    common: dict[str, Any] = {
        "time": options.time_limit,
        "partition": options.partition,
        "qos": sbatch.pop("qos", "normal"),
        "sbatch_args": sbatch,
        "mail_user": None,
        "env_command": f"export PATH={Path(sys.executable).parent}:$PATH",
        "skip_completed": False,
        "slurm_logs_folder": str(options.logs / "slurm"),
    }
    plan.folder.mkdir(parents=True, exist_ok=True)
    share_executor = SlurmPipelineExecutor(
        [partial(share_step, plan)],
        tasks=min(options.tasks, len(plan.pieces)),
        job_name="tokenize",
        logging_dir=str(options.logs / "share"),
        **common,
    )
    join_executor = SlurmPipelineExecutor(
        [partial(join_step, plan)],
        tasks=1,
        job_name="tokenize_finish",
        logging_dir=str(options.logs / "finish"),
        depends=share_executor,
        **common,
    )
    try:
        join_executor.run()
    except Exception as error:
        raise ConfigError(f"Slurm did not take the job ({error}): see its message above") from error
    return [str(share_executor.job_id), str(join_executor.job_id)]


def share_step(plan: JobPlan, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
    """Make this task's share of the pieces, as a pipeline step of datatrove."""
    make_share(plan, (rank, world_size), 1, ignore_report)


def join_step(plan: JobPlan, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
    """Join the pieces and print the summary to the log, as a pipeline step of datatrove."""
    start = time.monotonic()
    with locked(plan):
        summary = join_pieces(plan)
    summary["seconds"] = round(time.monotonic() - start, 1)
    print(json.dumps(summary, indent=2), flush=True)


def ignore_report(summary: PieceSummary, kept: bool) -> None:
    """Report no progress."""
