"""Write sweep.json: a sweep as it was started, with all that its table and page need."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_kd.storage.provenance import commit
from megatron_kd.sweep.definition.tasks import Cell, Sweep
from megatron_kd.sweep.execution.task_state import write_json
from megatron_kd.sweep.file_names import FORMAT, SWEEP_FILE

_PACKAGES = ("torch", "megatron-core", "numpy")


def provenance() -> dict[str, str]:
    """Return commit and machine, for the records of all tasks."""
    return {"commit": commit(), "machine": machine()}


def machine() -> str:
    """Describe the processor, its usable cores, and the GPUs."""
    parts = [f"{_processor()}, {len(os.sched_getaffinity(0))} cores"]
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        try:
            names = subprocess.run(
                command, capture_output=True, text=True, timeout=20, check=False
            ).stdout.splitlines()
        except (OSError, subprocess.TimeoutExpired):
            names = []
        parts += [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    return ", ".join(parts)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    versions_by_name = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions_by_name[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions_by_name


def write_sweep(sweep: Sweep, origin: dict[str, str]) -> None:
    """Write sweep.json into the sweep's folder.

    Args:
        sweep: The sweep.
        origin: Commit and machine, from `provenance`.
    """
    section = sweep.content.sweep
    content = {
        "format": FORMAT,
        "title": section.title,
        "text": section.text,
        "file": str(sweep.path.resolve()),
        "small": sweep.small,
        "seeds": list(sweep.seeds),
        "baseline": section.baseline,
        "variables": {name: sweep.variables[name] for name in sweep.content.variables},
        "cells": [_cell(cell) for cell in sweep.cells],
        "left_out": list(sweep.skipped),
        "metrics": [metric.model_dump() for metric in sweep.content.metric],
        "plots": [plot.model_dump() for plot in sweep.content.plot],
        "digest": sweep.digest(),
        **origin,
        "versions": versions(),
        "command": shlex.join(["python", *sys.argv]),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    sweep.out.mkdir(parents=True, exist_ok=True)
    write_json(sweep.out / SWEEP_FILE, content)


def _cell(cell: Cell) -> dict[str, Any]:
    """Return a cell with the folder of each seed and the digests of its steps."""
    runs = {
        str(seed): {"folder": task.folder, "steps": {step.name: step.digest for step in task.steps}}
        for seed, task in cell.runs.items()
    }
    return {
        "name": cell.name,
        "group": cell.group,
        "values": cell.values,
        "paper": cell.paper,
        "runs": runs,
    }
