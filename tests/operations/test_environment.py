"""Around a run: what is not installed, and clocks that do not agree."""

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
def test_what_is_not_installed_is_named_at_the_start(tmp_path: Path) -> None:
    run = write_run(tmp_path, "run", write_tokens(tmp_path))
    for names in (["psutil"], ["zstandard", "pyarrow"]):
        command = [sys.executable, "-c", WITHOUT.replace("{names}", repr(set(names))), str(run)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        told = done.stderr.splitlines()
        assert done.returncode == 2, done.stderr
        assert len(told) == 1, done.stderr
        assert f"not installed here: {', '.join(sorted(names, key=order))}" in told[0], done.stderr
    assert not (tmp_path / "run").exists()


def order(name: str) -> int:
    return (ROOT / "setup.py").read_text().index(f'"{name}"')


def asked_with_other_clocks(rendezvous: str, folder: Path) -> list[tuple[int, int]]:
    """(own answer, answer of all) at six times; rank 1's clock is an hour off, and five times as fast."""
    import torch.distributed as dist

    rank, now = int(os.environ["RANK"]), [100.0]
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    time.monotonic = lambda: now[0] * (5 if rank else 1) + 3600 * rank  # type: ignore[assignment]
    leaving = ShutdownRequest(folder, minutes=1.0, watches_file=False)
    found = []
    for _ in range(6):
        found.append((int(leaving.poll()), int(leaving.agree(torch.device("cpu")))))
        now[0] += 5
    dist.destroy_process_group()
    return found


@pytest.mark.dist
@pytest.mark.fault(19)
def test_clocks_that_differ(tmp_path: Path, measured: Callable[[str], None]) -> None:
    """The fast clock's rank thinks the minute is over after 12 seconds: all leave with it."""
    slow, fast = run_ranks(asked_with_other_clocks, 2, tmp_path)
    assert [own for own, _ in slow] == [Action.CONTINUE] * 6
    assert Action.REQUEUE in [own for own, _ in fast]
    measured(
        f"one clock an hour off and five times as fast: all leave at look {[own for own, _ in fast].index(Action.REQUEUE) + 1} of 6"
    )
    assert (
        [agreed for _, agreed in slow] == [agreed for _, agreed in fast] == [own for own, _ in fast]
    )


@pytest.mark.dist
@pytest.mark.fault(11)
def test_a_run_does_not_go_on_with_other_settings(
    tmp_path: Path, measured: Callable[[str], None]
) -> None:
    tokens, others = write_tokens(tmp_path), write_tokens(tmp_path, seed=1)
    teacher = write_run(tmp_path, "teacher", tokens, train={"steps": 3})
    online = {"source": "online", "checkpoint": str(tmp_path / "teacher")}
    run = write_run(
        tmp_path, "run", tokens, train={"steps": 2}, teacher=online, distill={"top_k": 8}
    )
    cases = {
        "--distill.top_k": ("4", "distill.top_k: was 8, is now 4"),
        "--distill.temperature": ("2.0", "distill.temperature: was the default, is now 2.0"),
        "--batch.sequence_length": ("16", "batch.sequence_length: was 24, is now 16"),
        "--batch.global_batch_size": ("2", "batch.global_batch_size: was 4, is now 2"),
        "--train.seed": ("9", "train.seed: was 7, is now 9"),
        "--data.train": (others, "data.train: "),
    }
    tries: dict[str, tuple[str, ...]] = {
        key: ("--train.steps", "3", key, value) for key, (value, _) in cases.items()
    }
    # A longer run in another layout is the same run. What changes on request is what the run has from then on.
    tries["longer"] = (
        "--train.steps",
        "3",
        "--batch.micro_batch_size",
        "1",
        "--distill.head_schedule",
        "chunk",
    )
    tries["allowed"] = (
        "--train.steps",
        "4",
        "--distill.top_k",
        "4",
        "--checkpoint.allow_changes",
        "true",
    )
    tries["as allowed"] = ("--train.steps", "5", "--distill.top_k", "4")
    tries["as before"] = ("--train.steps", "6")
    jobs = [
        (main, (teacher,)),
        (main, (run,)),
        *((main, (run, *words)) for words in tries.values()),
    ]
    ended = run_ranks(in_forks, 1, jobs, timeout=200)[0]
    assert [each.value for each in ended[:2]] == [0, 0], ended[1].output
    found = dict(zip(tries, ended[2:], strict=True))
    for key, (_, sentence) in cases.items():
        assert found[key].value == 2, found[key].output
        assert found[key].output.count("megatron_kd: error") == 1, found[key].output
        assert sentence in found[key].output, found[key].output
    assert [found[name].value for name in ("longer", "allowed", "as allowed", "as before")] == [
        0,
        0,
        0,
        2,
    ], found["allowed"].output
    measured(f"{len(cases)} of {len(cases)} changes refused by name; one allowed and recorded")
    assert (
        "continuing with other settings: distill.top_k: was 8, is now 4" in found["allowed"].output
    )
    assert "distill.top_k: was 8, is now 4" in (tmp_path / "run/checkpoints.jsonl").read_text()
