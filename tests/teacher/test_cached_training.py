"""Compare students of a stored teacher with students of the live one."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_kd.config import dump_toml
from tests.helpers.tiny import tiny
from tests.teacher.stored_runs import extraction, losses, student
from tests.train.test_program import command, finish, start

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]


class StudentRuns:
    """Train students of one teacher in a folder: of the live one, and of its caches."""

    def __init__(self, folder: Path, teacher: tuple[Path, str]) -> None:
        self.folder = folder
        self.teacher = teacher
        online = student(folder, "online", teacher)
        for encoding in ("fp32", "quantized"):
            code, output = finish(
                start(
                    extraction(
                        online,
                        folder / encoding,
                        "--value-encoding",
                        encoding,
                        "--shard-samples",
                        "50",
                    )
                )
            )
            assert code == 0, output
        assert finish(start(command(online)))[0] == 0

    def cached(
        self, name: str, encoding: str = "fp32", *, ranks: int = 1, **overrides: Any
    ) -> list[tuple[float, float, float]]:
        source = {"source": "cached", "cache": str(self.folder / encoding)}
        code, output = finish(
            start(
                command(
                    student(self.folder, name, self.teacher, teacher=source, **overrides),
                    ranks=ranks,
                )
            )
        )
        assert code == 0, output
        return losses(self.folder / name)


@pytest.mark.parametrize(
    "other_layouts", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_a_stored_teacher_teaches_like_the_live_one(
    teacher: tuple[Path, str], tmp_path: Path, other_layouts: bool
) -> None:
    """Compare curves: fp32 is equal to the bit in one process, quantised values are close.

    Other layouts, micro-batch sizes and seeds differ by no more than layouts do.
    """
    runs = StudentRuns(tmp_path, teacher)
    live = losses(tmp_path / "online")
    assert len(live) == 6
    assert all(kd > 0 for _, _, kd in live)
    torch.testing.assert_close(
        torch.tensor(runs.cached("close", "quantized")), torch.tensor(live), rtol=2e-3, atol=2e-4
    )
    assert runs.cached("same") == live
    if other_layouts:
        check_other_layouts(runs, live)
        check_another_seed(runs, live)


def check_other_layouts(runs: StudentRuns, live: list[tuple[float, float, float]]) -> None:
    for name, ranks, overrides in (
        ("tensor", 2, {"parallel": {"tensor": 2}}),
        ("pipeline", 2, {"parallel": {"pipeline": 2}}),
        ("data", 2, {"batch": {"micro_batch_size": 1}}),
    ):
        torch.testing.assert_close(
            torch.tensor(runs.cached(name, ranks=ranks, **overrides)),
            torch.tensor(live),
            rtol=1e-5,
            atol=1e-6,
        )


def check_another_seed(runs: StudentRuns, live: list[tuple[float, float, float]]) -> None:
    other = {"train": {"seed": 8}}
    assert finish(start(command(student(runs.folder, "online8", runs.teacher, **other))))[0] == 0
    assert runs.cached("other8", **other) != live
    torch.testing.assert_close(
        torch.tensor(losses(runs.folder / "other8")),
        torch.tensor(losses(runs.folder / "online8")),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.slow
def test_documented_commands(teacher: tuple[Path, str], tmp_path: Path) -> None:
    """Run the commands as they are documented, on two processes in place of eight."""
    run_file = student(
        tmp_path, "run", teacher, batch={"global_batch_size": 4, "micro_batch_size": 2}
    )
    page = (Path(__file__).parents[2] / "docs/teachers.md").read_text(encoding="utf-8")
    (block,) = [
        block
        for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
        if "cache_teacher" in block
    ]
    lines = block.splitlines()
    assert len(lines) == 3
    paths = {
        "run.toml": str(run_file),
        "cache/": str(tmp_path / "cache"),
        "runs/second": str(tmp_path / "run"),
    }
    for line in lines:
        words = shlex.split(
            line.replace("--nproc-per-node 8", "--standalone --nproc-per-node 2"), comments=True
        )
        words = [paths.get(word, word) for word in words]
        module = (
            ["-m", "torch.distributed.run", *words[1:]] if words[0] == "torchrun" else words[1:]
        )
        code, output = finish(start([sys.executable, *module]))
        assert code == 0, output
    assert len(losses(tmp_path / "run")) == 6


@pytest.mark.slow
def test_random_samples_are_equal_when_stored(teacher: tuple[Path, str], tmp_path: Path) -> None:
    draws = {"distill": {"num_draws": 20, "alpha": 0.7}}
    paths = []
    for name, source in (
        ("online", {}),
        ("cached", {"source": "cached", "cache": str(tmp_path / "cache")}),
    ):
        content = tiny(
            tmp_path / name,
            teacher[1],
            teacher={"source": "online", "checkpoint": str(teacher[0]), **source},
            train={"steps": 4},
            **draws,
        )
        paths.append(tmp_path / f"{name}.toml")
        paths[-1].write_text(dump_toml(content))
    code, output = finish(start(extraction(paths[0], tmp_path / "cache")))
    assert code == 0, output
    for path in paths:
        code, output = finish(start(command(path)))
        assert code == 0, output
    assert losses(tmp_path / "cached") == losses(tmp_path / "online")


@pytest.mark.slow
def test_the_live_teacher_serves_missing_samples(teacher: tuple[Path, str], tmp_path: Path) -> None:
    """Compare runs on a partial cache with runs on the live teacher alone."""
    run_file = student(tmp_path, "online", teacher)
    cache = tmp_path / "cache"
    code, output = finish(start(extraction(run_file, cache, "--first-samples", "30")))
    assert code == 0, output
    source = {"source": "cached", "cache": str(cache)}
    online = finish(start(command(run_file)))
    assert online[0] == 0, online[1]
    # A run that keeps fewer entries takes them out of the same cache.
    fewer = {"top_k": 5, "top_p": 0.8}
    assert (
        finish(
            start(
                command(
                    student(tmp_path, "fewer", teacher, distill=fewer, teacher={"source": "online"})
                )
            )
        )[0]
        == 0
    )
    assert abs(losses(tmp_path / "fewer")[-1][2] / losses(tmp_path / "online")[-1][2] - 1) > 0.01
    cases = (
        ("mixed", "online", 1, {}, {}),
        ("mixed_pipeline", "online", 2, {"pipeline": 2}, {}),
        ("part_of_it", "fewer", 1, {}, fewer),
    )
    for name, reference, ranks, parallel, distill in cases:
        mixed = student(
            tmp_path,
            name,
            teacher,
            teacher={**source, "on_miss": "online"},
            parallel=parallel,
            distill=distill,
        )
        code, output = finish(start(command(mixed, ranks=ranks)))
        assert code == 0, output
        torch.testing.assert_close(
            torch.tensor(losses(tmp_path / name)),
            torch.tensor(losses(tmp_path / reference)),
            rtol=3e-3,
            atol=3e-4,
        )
