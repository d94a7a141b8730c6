"""Test the commands of the example sweeps' pages and run files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from megatron_kd.config import load_config
from megatron_kd.sweep.definition.grid import resolve
from tests.helpers.program import ROOT
from tests.helpers.sweeps import tool

PAPER_GRID = ROOT / "examples/weak_teachers/paper_scale.toml"


def read_page(name: str) -> str:
    """Return the page of an example."""
    return (ROOT / f"examples/{name}/README.md").read_text(encoding="utf-8")


def program_commands(text: str) -> list[list[str]]:
    """Return the words of each command that starts a program, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [
        shlex.split(line, comments=True)
        for line in lines
        if line.startswith(("python ", "torchrun "))
    ]


def test_commands_of_the_pages(tmp_path: Path) -> None:
    """Check the tools and files of all commands, and list the sweeps at the papers' sizes."""
    commands = [
        words
        for name in ("design_space", "weak_teachers")
        for words in program_commands(read_page(name))
    ]
    assert len(commands) == 8
    for words in commands:
        assert words[1] in ("tools/sweep.py", "tools/report.py")
        assert words[0] == "python"
        assert not words[2].endswith(".toml") or (ROOT / words[2]).is_file(), words[2]
        if "paper_scale.toml" in words[2]:
            arguments = [str(ROOT / words[2]), "--output", str(tmp_path), "--list", *words[5:]]
            code, output = tool("sweep", *arguments)
            assert code == 0, output
            assert output.count("open ") >= 29, output


def test_options_of_the_papers_grids(tmp_path: Path) -> None:
    """Resolve the grids of the page's table, each with the options of the lines above it."""
    cells = [
        line.split("|")[2]
        for line in read_page("weak_teachers").splitlines()
        if line.startswith("| ") and "`--set" in line
    ]
    options = [" ".join(re.findall(r"`([^`]+)`", cell)) for cell in cells]
    assert len(options) == 3
    assert all("the line above" in cell for cell in cells[1:])
    for number in range(3):
        words = shlex.split(" ".join(options[: number + 1]))
        settings = [word for word in words if word != "--set"]
        sweep = resolve(PAPER_GRID, tmp_path, settings=settings)
        teachers = [
            task.steps[0].config for name, task in sweep.tasks.items() if name.startswith("teacher")
        ]
        students = [cell.runs[43].steps[0].config for cell in sweep.cells]
        assert {config.train.steps for config in students} == {25000}
        teacher_steps = 150000 if number == 2 else 25000
        assert {config.train.steps for config in teachers} == {teacher_steps}
        assert len(teachers) == 4
        assert all(("qwen" in config.model.preset) == (number == 0) for config in teachers)


def commented_runs(name: str) -> list[Any]:
    """Return the configurations of the commands in a run file's comments."""
    path = ROOT / f"examples/{name}.toml"
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = "\n".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    configs = []
    for words in program_commands(comments):
        start = words.index("--config") + 2
        overrides = [word.replace("--output", "--run.directory") for word in words[start:]]
        configs.append(load_config(["--config", str(path), *overrides]))
    return configs


def test_commands_of_the_design_space_run_file() -> None:
    stored, star = commented_runs("design_space/pd_star")
    assert stored.teacher.source == "huggingface"
    assert (stored.distill.top_k, stored.distill.top_p) == (100, 1.0)
    tokens_per_step = star.batch.global_batch_size * star.batch.sequence_length
    assert tokens_per_step * star.train.steps == pytest.approx(100e9, rel=1e-4)


def test_commands_of_the_weak_teachers_run_file() -> None:
    teacher, student = commented_runs("weak_teachers/recipe")
    assert (teacher.teacher.source, teacher.train.seed) == ("none", 42)
    assert teacher.train.steps == 6 * student.train.steps
    assert student.teacher.checkpoint == teacher.run.directory
    assert student.optimizer.warmup_steps * 20 == student.train.steps
