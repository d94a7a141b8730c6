"""sweep.json: a sweep as it was started, with all that a table or a page of it needs."""

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
from megatron_kd.sweep.grid import Cell, Sweep
from megatron_kd.sweep.task_state import write_json

SWEEP_FILE = "sweep.json"
FORMAT = 1
_PACKAGES = ("torch", "megatron-core", "numpy")


def provenance() -> dict[str, str]:
    """Commit and machine, for the record of everything that is done here."""
    return {"commit": commit(), "machine": machine()}


def machine() -> str:
    """Processor, its usable cores, and the GPUs."""
    found = [f"{_processor()}, {len(os.sched_getaffinity(0))} cores"]
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        try:
            names = subprocess.run(
                command, capture_output=True, text=True, timeout=20, check=False
            ).stdout.splitlines()
        except (OSError, subprocess.TimeoutExpired):
            names = []
        found += [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    return ", ".join(found)


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
    """Of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_sweep(sweep: Sweep, origin: dict[str, str]) -> None:
    """Write sweep.json into the sweep's folder. origin: what `provenance` found."""
    part = sweep.content.sweep
    content = {
        "format": FORMAT,
        "title": part.title,
        "text": part.text,
        "file": str(sweep.path.resolve()),
        "small": sweep.small,
        "seeds": list(sweep.seeds),
        "baseline": part.baseline,
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
    """runs: seed -> folder below the sweep's, and the digest of each of its steps."""
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
