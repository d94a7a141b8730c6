"""Run the program as a user does: torchrun, kills, bad input."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from megatron_kd.config import dump_toml
from megatron_kd.telemetry.metrics import METRICS
from tests.helpers.tiny import tiny, write_tokens

pytestmark = [pytest.mark.dist, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]


def command(config: Path, *overrides: str, ranks: int = 1) -> list[str]:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        if ranks > 1
        else []
    )
    return [
        sys.executable,
        *launcher,
        "-m",
        "megatron_kd.pretrain",
        "--config",
        str(config),
        *overrides,
    ]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 200) -> tuple[int, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        kill_tree(process)
    return process.returncode, out + err


def kill_tree(process: subprocess.Popen[str]) -> None:
    """Send SIGKILL to the launcher and every rank, which torchrun puts into separate sessions."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        for child in [*root.children(recursive=True), root]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.wait()


def write_run(folder: Path, name: str, tokens: str, **overrides: Any) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(dump_toml(tiny(folder / name, tokens, **overrides)))
    return path


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


RATES = {
    "tokens_per_second",
    "tflops_per_device",
    "mfu",
    "rank_seconds",
    "slowest_rank_seconds",
    "slowest_rank",
    "data_seconds",
}


@pytest.mark.slow
@pytest.mark.fault(1)
def test_killed_and_started_again(tmp_path: Path) -> None:
    """Restart after SIGKILL in the middle: metrics and weights equal those without the kill."""
    undisturbed, killed = write_pair(tmp_path)
    code, output = finish(start(command(undisturbed, ranks=2)))
    assert code == 0, output
    kill_in_the_middle(killed, tmp_path / "killed/metrics.jsonl")
    num_records = len(read_metrics(tmp_path / "undisturbed"))
    assert 0 < len(read_metrics(tmp_path / "killed")) < num_records, (
        "the kill must fall in the middle"
    )
    code, output = finish(start(command(killed, ranks=2)))
    assert code == 0, output

    metrics = [
        [
            {k: v for k, v in record.items() if k not in RATES}
            for record in read_metrics(tmp_path / name)
        ]
        for name in ("undisturbed", "killed")
    ]
    assert metrics[0] == metrics[1]
    assert sorted(p.name for p in (tmp_path / "killed/checkpoints").iterdir()) == [
        "step-00000048",
        "step-00000060",
    ]
    assert json.loads((tmp_path / "killed/status.json").read_text())["state"] == "finished"
    check_files(tmp_path / "undisturbed")

    # The finished run, extended, continues from its end.
    code, output = finish(start(command(undisturbed, "--train.steps", "62", ranks=2)))
    assert code == 0, output
    assert read_metrics(tmp_path / "undisturbed")[-1]["step"] == 62, output


def write_pair(folder: Path) -> tuple[Path, Path]:
    """Write two run files that differ in the directory only."""
    tokens = write_tokens(folder)
    valid = write_tokens(folder, tokens=1500, seed=1)
    shared: dict[str, Any] = {
        "parallel": {"tensor": 2},
        "data": {"valid": {"held_out": valid}},
        "train": {"steps": 60, "evaluate_interval": 25},
        "checkpoint": {"interval": 16, "keep_last": 2},
        "telemetry": {"tensorboard": True},
    }
    undisturbed = write_run(folder, "undisturbed", tokens, **shared)
    return undisturbed, write_run(folder, "killed", tokens, **shared)


def kill_in_the_middle(config: Path, metrics: Path) -> None:
    """Start a run and kill it once it has written 25 records of metrics."""
    process = start(command(config, ranks=2))
    deadline = time.monotonic() + 120
    while (
        not (metrics.exists() and len(metrics.read_text().splitlines()) >= 25)
        and time.monotonic() < deadline
        and process.poll() is None
    ):
        time.sleep(0.02)
    kill_tree(process)
    finish(process)


def check_files(directory: Path) -> None:
    """Check the metrics and other files of a finished run."""
    names = {
        "step",
        "total_loss",
        "ce_loss",
        "kd_loss",
        "grad_norm",
        "learning_rate",
        "alpha",
        "tokens",
        "tokens_per_second",
    }
    records = read_metrics(directory)
    assert names <= records[0].keys()
    assert {"step", "split", "ce_loss", "kd_loss"} <= records[-1].keys()
    for record in records:
        assert record.keys() <= {"step", "split", *METRICS}
    assert list((directory / "tensorboard").iterdir())
    assert (directory / "config.toml").exists()


@pytest.mark.fault(8)
def test_nan_stops_before_the_weights(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path)
    run = write_run(
        tmp_path,
        "nan",
        tokens,
        optimizer={
            "learning_rate": 1e30,
            "min_learning_rate": 1e30,
            "clip_grad": 0.0,
            "warmup_steps": 0,
        },
    )
    code, output = finish(start(command(run)))
    assert code == 93, output
    assert "the weights were not changed" in output, output
    assert json.loads((tmp_path / "nan/status.json").read_text())["state"] == "stopped"
    code, output = finish(
        start(command(run, "--train.nonfinite", "skip", "--train.max_nonfinite_steps", "3"))
    )
    assert code == 93, output
    assert "4 such step(s)" in output, output
    assert read_metrics(tmp_path / "nan")[-1]["nonfinite_steps"] >= 3


@pytest.mark.fault(9)
def test_bad_input_is_one_sentence_on_every_rank(tmp_path: Path) -> None:
    """Start two ranks in each case. Each prints one sentence and ends before any collective."""
    tokens = write_tokens(tmp_path)
    run = write_run(tmp_path, "run", tokens)
    cases = bad_inputs(tmp_path, tokens)
    for name, (overrides, message) in cases.items():
        processes = [_rank(run, rank, overrides) for rank in range(2)]
        for process in processes:
            code, output = finish(process)
            errors = [
                line for line in output.splitlines() if line.startswith("megatron_kd: error:")
            ]
            assert code == 2, (name, code, output)
            assert len(errors) == 1, (name, code, output)
            assert message in errors[0], (name, code, output)
            assert "Traceback" not in output, (name, output)


def _rank(run: Path, rank: int, overrides: list[str]) -> subprocess.Popen[str]:
    """Start one rank of two that never meet. A collective would hang until the time limit."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
    }
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    arguments = command(run, *overrides)
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def bad_inputs(folder: Path, tokens: str) -> dict[str, tuple[list[str], str]]:
    """Return name -> (overrides, text that the message contains)."""
    bad = folder / "bad"
    bad.mkdir()
    other = folder / "other"
    write_checkpoint(other, tokens, vocab_size=101)
    teacher = ["--teacher.source", "online", "--teacher.checkpoint"]
    return {
        **bad_token_files(bad, tokens),
        "missing teacher": (
            [*teacher, str(folder / "nowhere")],
            "teacher.checkpoint: no checkpoint at",
        ),
        "teacher's vocabulary": (
            [*teacher, str(write_checkpoint(folder / "small", tokens, vocab_size=99))],
            "has a vocabulary of 99 ids, this run has 101",
        ),
        "another model": (
            ["--checkpoint.initialize_from", str(other)],
            "holds another model: model.num_layers is 2 there and 4 here",
        ),
        "long sequence": (["--batch.sequence_length", "40000"], "fewer than one sequence"),
        "top_k": ([*teacher, str(other), "--distill.top_k", "102"], "distill.top_k (102)"),
        "temperature": (["--distill.temperature", "0"], "distill.temperature"),
        "batch": (
            ["--batch.global_batch_size", "6", "--batch.micro_batch_size", "2"],
            "batch.global_batch_size (6)",
        ),
        "ranks": (["--parallel.pipeline", "4"], "2 processes cannot be split"),
        "unknown key": (["--optimizer.learning_rat", "1"], "optimizer.learning_rate"),
        "no data": (["--data.train", str(bad / "absent")], "absent"),
    }


def bad_token_files(folder: Path, tokens: str) -> dict[str, tuple[list[str], str]]:
    """Write damaged copies of a token file."""
    content = Path(f"{tokens}.bin").read_bytes()
    invalid = np.frombuffer(content, dtype="<u2").copy()
    invalid[777] = 5000
    copies = {
        "truncated .bin": (content[:-7], "bytes"),
        "oversized .bin": (content + b"123", "bytes"),
        "invalid id": (invalid.tobytes(), "5000"),
    }
    cases = {}
    for number, (name, (data, message)) in enumerate(copies.items()):
        prefix = folder / f"copy{number}"
        prefix.with_suffix(".idx").write_bytes(Path(f"{tokens}.idx").read_bytes())
        prefix.with_suffix(".bin").write_bytes(data)
        cases[name] = (["--data.train", str(prefix)], message)
    return cases


def write_checkpoint(folder: Path, tokens: str, *, vocab_size: int) -> Path:
    """Write the description of a checkpoint of a model with two layers."""
    step_folder = folder / "checkpoints/step-00000003"
    step_folder.mkdir(parents=True)
    model = tiny(folder, tokens).model.model_dump(mode="json")
    state = {
        "format": 1,
        "step": 3,
        "consumed_samples": 0,
        "consumed_tokens": 0,
        "nonfinite_steps": 0,
        "tokenizer": None,
        "precision": "fp32",
        "distributed_optimizer": False,
        "version": "0",
        "model": {**model, "num_layers": 2},
        "vocab_size": vocab_size,
    }
    (step_folder / "state.json").write_text(json.dumps(state))
    return folder
