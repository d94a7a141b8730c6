"""The environment of a run: missing packages, different clocks, changed settings."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_kd.train.shutdown import Action, ShutdownRequest
from tests.checkpoint.fault_runs import main
from tests.helpers.forks import in_forks
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import write_tokens
from tests.helpers.tools import ROOT
from tests.train.test_program import write_run

WITHOUT = """
import runpy, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
sys.argv = ["pretrain", "--config", sys.argv[1]]
runpy.run_module("megatron_kd.pretrain", run_name="__main__")
"""


@pytest.mark.fault(20)
def test_missing_packages_are_named_at_the_start(tmp_path: Path) -> None:
    run = write_run(tmp_path, "run", write_tokens(tmp_path))
    for names in (["psutil"], ["zstandard", "pyarrow"]):
        command = [sys.executable, "-c", WITHOUT.replace("{names}", repr(set(names))), str(run)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        errors = done.stderr.splitlines()
        assert done.returncode == 2, done.stderr
        assert len(errors) == 1, done.stderr
        assert f"not installed here: {', '.join(sorted(names, key=order))}" in errors[0], (
            done.stderr
        )
    assert not (tmp_path / "run").exists()


def order(name: str) -> int:
    return (ROOT / "setup.py").read_text().index(f'"{name}"')


def poll_with_other_clocks(rendezvous: str, folder: Path) -> list[tuple[int, int]]:
    """Return (local action, agreed action) at six times; rank 1's clock is wrong and too fast."""
    import torch.distributed as dist

    rank, now = int(os.environ["RANK"]), [100.0]
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    time.monotonic = lambda: now[0] * (5 if rank else 1) + 3600 * rank  # type: ignore[assignment]
    request = ShutdownRequest(folder, minutes=1.0, watches_file=False)
    actions = []
    for _ in range(6):
        actions.append((int(request.poll()), int(request.agree(torch.device("cpu")))))
        now[0] += 5
    dist.destroy_process_group()
    return actions


@pytest.mark.dist
@pytest.mark.fault(19)
def test_clocks_that_differ(tmp_path: Path, measured: Callable[[str], None]) -> None:
    """The minute of the fast clock ends after 12 seconds, and all ranks stop together."""
    slow, fast = run_ranks(poll_with_other_clocks, 2, tmp_path)
    assert [local for local, _ in slow] == [Action.CONTINUE] * 6
    assert Action.REQUEUE in [local for local, _ in fast]
    poll = [local for local, _ in fast].index(Action.REQUEUE) + 1
    measured(f"one clock an hour off and five times as fast: all stop at poll {poll} of 6")
    assert (
        [agreed for _, agreed in slow]
        == [agreed for _, agreed in fast]
        == [local for local, _ in fast]
    )


def refused_changes(other_tokens: str) -> dict[str, tuple[str, str]]:
    """Return key -> (value, message) of the changes that a run refuses."""
    return {
        "--distill.top_k": ("4", "distill.top_k: was 8, is now 4"),
        "--distill.temperature": ("2.0", "distill.temperature: was the default, is now 2.0"),
        "--batch.sequence_length": ("16", "batch.sequence_length: was 24, is now 16"),
        "--batch.global_batch_size": ("2", "batch.global_batch_size: was 4, is now 2"),
        "--train.seed": ("9", "train.seed: was 7, is now 9"),
        "--data.train": (other_tokens, "data.train: "),
    }


def accepted_changes() -> dict[str, tuple[str, ...]]:
    """Return name -> options of runs in order; the last one lacks a change allowed before."""
    # A longer run in another layout is the same run. Allowed changes become the run's settings.
    return {
        "longer": (
            "--train.steps",
            "3",
            "--batch.micro_batch_size",
            "1",
            "--distill.head_schedule",
            "chunk",
        ),
        "allowed": (
            "--train.steps",
            "4",
            "--distill.top_k",
            "4",
            "--checkpoint.allow_changes",
            "true",
        ),
        "as allowed": ("--train.steps", "5", "--distill.top_k", "4"),
        "as before": ("--train.steps", "6"),
    }


@pytest.mark.dist
@pytest.mark.fault(11)
def test_a_run_does_not_resume_with_other_settings(
    tmp_path: Path, measured: Callable[[str], None]
) -> None:
    tokens, others = write_tokens(tmp_path), write_tokens(tmp_path, seed=1)
    teacher = write_run(tmp_path, "teacher", tokens, train={"steps": 3})
    online = {"source": "online", "checkpoint": str(tmp_path / "teacher")}
    run = write_run(
        tmp_path, "run", tokens, train={"steps": 2}, teacher=online, distill={"top_k": 8}
    )
    cases = refused_changes(others)
    tries: dict[str, tuple[str, ...]] = {
        key: ("--train.steps", "3", key, value) for key, (value, _) in cases.items()
    }
    tries |= accepted_changes()
    jobs = [
        (main, (teacher,)),
        (main, (run,)),
        *((main, (run, *words)) for words in tries.values()),
    ]
    ended = run_ranks(in_forks, 1, jobs, timeout=200)[0]
    assert [end.value for end in ended[:2]] == [0, 0], ended[1].output
    ends = dict(zip(tries, ended[2:], strict=True))
    for key, (_, sentence) in cases.items():
        assert ends[key].value == 2, ends[key].output
        assert ends[key].output.count("megatron_kd: error") == 1, ends[key].output
        assert sentence in ends[key].output, ends[key].output
    assert [ends[name].value for name in ("longer", "allowed", "as allowed", "as before")] == [
        0,
        0,
        0,
        2,
    ], ends["allowed"].output
    measured(f"{len(cases)} of {len(cases)} changes refused by name; one allowed and recorded")
    assert (
        "continuing with other settings: distill.top_k: was 8, is now 4" in ends["allowed"].output
    )
    assert "distill.top_k: was 8, is now 4" in (tmp_path / "run/checkpoints.jsonl").read_text()
