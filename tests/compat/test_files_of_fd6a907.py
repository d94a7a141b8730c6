"""Read the files that commit fd6a907 wrote: token files, checkpoints, caches and run files.

The folder `fd6a907/` beside this file holds a teacher trained for 8 steps while its targets were
captured, two caches made from it (the top 8 ids; 12 samples), and a distilled student saved at step
4 of 8. `expected.json` holds the metrics of the student's last 4 steps and some cache records, as
that commit read them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_kd.cache import CacheReader
from megatron_kd.config import load_config
from megatron_kd.data.token_files import read_index

ROOT = Path(__file__).parents[2]
FILES = Path(__file__).parent / "fd6a907"
EXPECTED: dict[str, Any] = json.loads((FILES / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a copy of the files that a test may write beside."""
    copy = tmp_path / "files"
    shutil.copytree(FILES, copy)
    return copy


def run(folder: Path, *words: str) -> None:
    """Run a program of this project in `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def metrics(path: Path) -> dict[int, dict[str, Any]]:
    """Return the lines of a metrics.jsonl by step."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["step"]: line for line in lines}


def check_steps(steps: dict[int, dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Compare metrics of each expected step, to what fp32 on another processor may round."""
    for line in expected:
        step = steps[line["step"]]
        for name, value in line.items():
            assert step[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (line["step"], name)


def test_student_resumes_from_its_checkpoint(folder: Path) -> None:
    run(folder, "-m", "megatron_kd.pretrain", "--config", "student.toml")
    steps = metrics(folder / "student/metrics.jsonl")
    assert sorted(steps) == [5, 6, 7, 8]
    check_steps(steps, EXPECTED["student"])


def test_dumped_run_file_is_read(folder: Path) -> None:
    config = load_config(["--config", str(folder / "student/config.toml")])
    assert config.train.steps == 8
    assert config.distill.alpha == 0.5
    assert config.distill.tail == "bucket"
    assert config.model.hidden_size == 16


def test_teacher_is_trained_the_same_way(folder: Path) -> None:
    """Repeat the teacher's run: its metrics and its captured targets are those of the folder."""
    shutil.move(folder / "teacher", folder / "old_teacher")
    shutil.move(folder / "captured", folder / "old_captured")
    run(folder, "-m", "megatron_kd.pretrain", "--config", "teacher.toml")
    check_steps(metrics(folder / "teacher/metrics.jsonl"), EXPECTED["teacher"])
    old = json.loads((folder / "old_captured/cache.json").read_text(encoding="utf-8"))
    new = json.loads((folder / "captured/cache.json").read_text(encoding="utf-8"))
    assert new == old


@pytest.mark.parametrize("name", ["cache", "sampled", "captured"])
def test_cache_records_are_decoded(name: str) -> None:
    reader = CacheReader(FILES / name)
    assert len(reader) == EXPECTED[name]["samples"]
    for record in EXPECTED[name]["first"]:
        target = reader.get_many([bytes.fromhex(record["key"])])
        count = len(record["indices"])
        assert target.indices[:count, 0].tolist() == record["indices"]
        logprobs = [
            [-torch.inf if value is None else value for value in token]
            for token in record["logprobs"]
        ]
        assert torch.equal(target.logprobs[:count, 0], torch.tensor(logprobs))


def test_token_file_is_read() -> None:
    index = read_index(str(FILES / "tokens"))
    assert index.num_tokens == EXPECTED["tokens"]["num_tokens"]
    assert len(index.lengths) == EXPECTED["tokens"]["documents"]


@pytest.mark.parametrize("run_directory", ["teacher", "student"])
def test_checkpoint_digests_match(folder: Path, run_directory: str) -> None:
    run(folder, str(ROOT / "tools/verify_checkpoint.py"), run_directory)


def test_teacher_checkpoint_serves_online_and_as_a_cache_identity(folder: Path) -> None:
    """Distil online from the old checkpoint; the first step's KL is that of the cached run."""
    student = folder / "student.toml"
    overrides = ["--run.directory", "online", "--teacher.source", "online"]
    run(folder, "-m", "megatron_kd.pretrain", "--config", student.name, *overrides)
    online = metrics(folder / "online/metrics.jsonl")
    shutil.rmtree(folder / "student")
    run(folder, "-m", "megatron_kd.pretrain", "--config", student.name)
    cached = metrics(folder / "student/metrics.jsonl")
    for step in (1, 8):
        assert cached[step]["kl"] == pytest.approx(online[step]["kl"], rel=0.02, abs=1e-5), step
