"""Write run files of students, and read caches and curves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from megatron_kd.cache import CacheReader
from tests.train.test_program import read_metrics, write_run

SELECTION = {"top_k": 12, "top_p": 0.95, "tail": "bucket", "alpha": 0.7}


def extraction(run_file: Path, cache: Path, *options: str, ranks: int = 1) -> list[str]:
    """Return the command that stores a teacher's targets."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        if ranks > 1
        else []
    )
    return [
        sys.executable,
        *launcher,
        "tools/cache_teacher.py",
        "--config",
        str(run_file),
        "--output",
        str(cache),
        *options,
    ]


def student(folder: Path, name: str, trained: tuple[Path, str], /, **overrides: Any) -> Path:
    settings: dict[str, Any] = {
        "distill": SELECTION,
        "train": {"steps": 6},
        "teacher": {"source": "online", "checkpoint": str(trained[0])},
    }
    for section, keys in overrides.items():
        settings[section] = {**settings.get(section, {}), **keys}
    return write_run(folder, name, trained[1], **settings)


def records(cache: Path) -> dict[bytes, bytes]:
    reader = CacheReader(cache)
    return {key: reader.record(key).payload for key in reader.keys()}


def losses(folder: Path) -> list[tuple[float, float, float]]:
    return [
        (record["total_loss"], record["ce_loss"], record["kd_loss"])
        for record in read_metrics(folder)
        if "split" not in record
    ]
