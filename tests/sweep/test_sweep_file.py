"""Sweep files: placeholders, combinations, folder names, and one sentence for every problem."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_kd.config import ConfigError
from megatron_kd.sweep.definition.grid import resolve
from megatron_kd.sweep.definition.tasks import Sweep, select
from megatron_kd.sweep.definition.templating import fill, slug
from megatron_kd.sweep.execution.slurm import ranges
from tests.helpers.sweeps import ROOT, write_sweep

HEAD = '[sweep]\ntitle = "T"\nseeds = [1, 2]\n'
CELL = '[[cell]]\nname = "lm"\nrun = "student.toml"\n'
GRID = """
[sweep]
title = "T"
seeds = [1, 2]
baseline = "alpha 0.0 k 8"
measure = [["{python}", "-c", "pass {{}}", "{run}", "{seed}"]]
[variables]
steps = 400
name = "word"
data = "{out}/{name}"
[small]
steps = 4
seeds = [5]
cells = ["alpha 0.5*"]
[[job]]
name = "teacher_{size}"
vary = { size = [64, 128] }
run = "student.toml"
overrides = { "train.steps" = "{steps}", "model.hidden_size" = "{size}" }
needs = ["data"]
[[job]]
name = "data"
command = ["{python}", "{repo}/x", "{here}", "{data}", 3, true]
[[cell]]
group = "alpha"
name = "alpha {alpha} k {k}"
vary = { alpha = [0.0, 0.5], k = [8, 16] }
run = "student.toml"
needs = ["teacher_*"]
paper = { accuracy = { "0.0, 8" = 37.7, "0.5,16" = 38 }, loss = 2 }
[cell.overrides]
"distill.alpha" = "{alpha}"
"distill.top_k" = "{k}"
"data.train" = ["{data}", "b"]
"data.valid" = { held = "{data}" }
[[cell]]
name = "pair {a}"
vary = [{ a = 1, b = 2 }, { a = 3, b = 4 }]
vary_small = [{ a = 1, b = 2 }]
run = "student.toml"
measure = []
[[metric]]
name = "accuracy"
file = "evaluate.json"
key = "a.b"
[[metric]]
name = "loss"
split = "heldout"
key = "ce_loss"
"""


def resolved(folder: Path, text: str, **options: Any) -> Sweep:
    return resolve(write_sweep(folder / "here", text), folder / "out", **options)


def test_cells_and_levels_of_a_grid(tmp_path: Path) -> None:
    sweep = resolved(tmp_path, GRID)
    assert [cell.name for cell in sweep.cells] == [
        f"alpha {a} k {k}" for a in (0.0, 0.5) for k in (8, 16)
    ] + ["pair 1", "pair 3"]
    assert sweep.cells[1].values == {"alpha": 0.0, "k": 16}
    assert sweep.cells[5].values == {
        "a": 3,
        "b": 4,
    }
    assert [cell.paper for cell in sweep.cells[:4]] == [
        {"accuracy": 37.7, "loss": 2},
        {"loss": 2},
        {"loss": 2},
        {"accuracy": 38, "loss": 2},
    ]
    assert list(sweep.tasks)[:3] == ["data", "teacher_64", "teacher_128"]
    assert len(sweep.tasks) == 3 + 6 * 2
    assert [[len(level)] for level in sweep.levels()] == [[1], [2], [12]]


def test_tasks_of_a_grid(tmp_path: Path) -> None:
    sweep = resolved(tmp_path, GRID)
    data, out = sweep.tasks["data"], tmp_path / "out"
    assert data.steps[0].argv == (
        sys.executable,
        f"{ROOT}/x",
        str(tmp_path / "here"),
        f"{out}/word",
        "3",
        "true",
    )
    task = sweep.tasks["alpha 0.5 k 16, seed 2"]
    assert task.needs == ("teacher_64", "teacher_128")
    assert task.folder == "runs/alpha-0.5-k-16/seed-2"
    run, measure = task.steps
    assert run.config is not None
    assert run.config.train.seed == 2
    assert str(run.config.run.directory) == f"{out}/{task.folder}"
    assert (run.config.distill.alpha, run.config.distill.top_k, run.config.train.steps) == (
        0.5,
        16,
        6,
    )
    assert run.config.data.train == (f"{out}/word", "b")
    assert run.config.data.valid == {"held": f"{out}/word"}
    assert measure.argv == (sys.executable, "-c", "pass {}", f"{out}/{task.folder}", "2")
    assert len(sweep.tasks["pair 3, seed 1"].steps) == 1
    teacher = sweep.tasks["teacher_128"].steps[0].config
    assert teacher is not None
    assert (
        teacher.train.steps,
        teacher.train.seed,
        teacher.model.hidden_size,
    ) == (400, 7, 128)
    assert str(teacher.run.directory) == f"{out}/jobs/teacher_128"


def test_tasks_of_a_grid_by_name(tmp_path: Path) -> None:
    sweep = resolved(tmp_path, GRID)
    assert list(select(sweep, ["pair*"])) == [
        f"pair {a}, seed {seed}" for a in (1, 3) for seed in (1, 2)
    ]
    assert len(select(sweep, ["alpha 0.0 k 8"])) == 3 + 2
    assert list(select(sweep, ["jobs/data"])) == ["data"]


def test_small_and_set(tmp_path: Path) -> None:
    sweep = resolved(tmp_path, GRID, small=True, settings=["name=other=x"], ranks=2)
    assert list(sweep.tasks) == [
        "data",
        "teacher_64",
        "teacher_128",
        "alpha 0.5 k 8, seed 5",
        "alpha 0.5 k 16, seed 5",
    ]
    assert "pair 1" in sweep.skipped
    assert "pair 3" not in sweep.skipped
    teacher = sweep.tasks["teacher_64"].steps[0]
    assert teacher.config is not None
    assert teacher.config.train.steps == 4
    assert "torch.distributed.run" in teacher.argv
    assert sweep.tasks["data"].steps[0].argv[3] == f"{tmp_path}/out/other=x"
    changed = resolved(tmp_path, GRID, settings=["steps=401"])
    same = {
        name for name, task in resolved(tmp_path, GRID).tasks.items() if task == changed.tasks[name]
    }
    assert same == changed.tasks.keys() - {"teacher_64", "teacher_128"}


def test_overrides_of_the_whole_sweep(tmp_path: Path) -> None:
    """They apply to cells and jobs, whose own overrides win; problems name the entry."""
    job = '[[job]]\nname = "first"\nrun = "student.toml"\noverrides = { "train.steps" = 3 }\n'
    text = (
        HEAD
        + '[sweep.overrides]\n"train.steps" = "{n}"\n"distill.alpha" = 0.25\n[variables]\nn = 9\n'
        + CELL
        + job
    )
    configs = {task.name: task.steps[0].config for task in resolved(tmp_path, text).tasks.values()}
    settings = {
        name: (config.train.steps, config.distill.alpha)
        for name, config in configs.items()
        if config is not None
    }
    assert settings == {"lm, seed 1": (9, 0.25), "lm, seed 2": (9, 0.25), "first": (3, 0.25)}
    with pytest.raises(ConfigError, match="train.seed is set by the sweep itself"):
        resolved(tmp_path, HEAD + '[sweep.overrides]\n"train.seed" = 1\n' + CELL)


def test_placeholders_slugs_and_ranges() -> None:
    names = {"a": 0.5, "b": True, "c": "x y", "d": [1, "2"]}
    assert fill("{a}", names, "") == 0.5
    assert fill("{d}", names, "") == [1, "2"]
    assert fill(["{{a}}", {"{c}": "{b}"}], names, "") == [
        "{a}",
        {"x y": True},
    ]
    assert fill("{a}|{b}|{c}|{d}", names, "") == '0.5|true|x y|[1, "2"]'
    assert slug("α = 0.5 / κ; $(x)") == "0.5-x"
    assert slug("../..") == ""
    assert slug(".hidden") == "hidden"
    assert slug("é") == "e"
    assert len(slug("a" * 300)) == 100
    assert ranges([7, 0, 1, 3, 2]) == "0-3,7"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = ", "not valid TOML"),
        ("a = 1", "no [sweep]"),
        (HEAD, "cell is missing"),
        (HEAD + "sedes = [1]\n" + CELL, "sweep sedes is no key"),
        (HEAD.replace("[1, 2]", "[1, 1]") + CELL, "different from each other"),
        (
            HEAD + CELL.replace('"lm"', '"{alhpa}"') + "vary = { alpha = [1] }",
            "did you mean {alpha}",
        ),
        (
            HEAD + CELL + "vary = { alpha = [0.1, 0.2] }",
            "would share the folder 'lm': put what varies into the name",
        ),
        (HEAD + CELL + CELL.replace("lm", "LM"), "'lm' and 'LM' would share the folder"),
        (HEAD + CELL.replace("lm", "../.."), "leaves no name for a folder"),
        (
            HEAD + CELL + 'needs = ["teacher"]',
            "'lm' needs 'teacher', and no job has that name: jobs are none",
        ),
        (HEAD + CELL + 'overrides = { "train.seed" = 1 }', "train.seed is set by the sweep itself"),
        (HEAD + CELL + 'overrides = { "train.stebs" = 1 }', "cell 'lm': unknown key train.stebs"),
        (HEAD + CELL + 'overrides = { "train.steps" = "{x" }', "single brace"),
        (HEAD + CELL + "vary = { seed = [1] }", "seed is set by the sweep itself"),
        (HEAD + CELL + "vary = { a = [] }", "'lm': vary has an empty list"),
        (
            HEAD + CELL + 'paper = { acc = 1 }\n[[metric]]\nname = "a"\nkey = "b"',
            "'acc' is no metric, metrics are 'a'",
        ),
        (
            HEAD
            + CELL.replace("lm", "{b} lm")
            + 'vary = { b = [1] }\npaper = { a = { "2" = 1 } }\n[[metric]]\nname = "a"\nkey = "b"',
            "'2' is none of the values that vary",
        ),
        (
            HEAD + CELL + '[[plot]]\nkind = "lines"\ntitle = "p"',
            "plot 'p': a plot of kind \"lines\" needs metric and x",
        ),
        (HEAD + CELL + '[[plot]]\nkind = "bars"\nmetric = "m"\ntitle = "p"', "'m' is no metric"),
        (
            HEAD + CELL + '[[metric]]\nname = "a"\nkey = "b"\nfile = "../x"',
            "a path inside the run's folder",
        ),
        (HEAD + CELL + '[[job]]\nname = "j"', "either run = a run file, or command"),
        (
            HEAD + CELL + '[[job]]\nname = "j"\ncommand = ["a"]\nneeds = ["j"]',
            "need each other in a circle",
        ),
        (HEAD + '[variables]\na = "{b}"\nb = "{a}"\n' + CELL, "name each other in a circle"),
        (HEAD + "[small]\na = 1\n" + CELL, "small: a replaces nothing"),
        (HEAD + 'baseline = "x"\n' + CELL, "no cell is named 'x'"),
        (HEAD + 'baseline = ["lm", "x"]\n' + CELL, "no cell is named 'x'"),
        (HEAD + CELL.replace("student", "nowhere"), "cell 'lm': run file"),
    ],
)
def test_a_problem_is_reported_in_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolved(tmp_path, text)
    assert words in str(error.value), str(error.value)
    assert "\n" not in str(error.value), str(error.value)


def test_invalid_settings(tmp_path: Path) -> None:
    for setting, words in {
        "stebs=1": "did you mean steps",
        "steps": "name=value",
        "steps=x": "not a value as in TOML",
    }.items():
        with pytest.raises(ConfigError, match=words):
            resolved(tmp_path, GRID, settings=[setting])
    with pytest.raises(ConfigError, match="nothing of the sweep matches"):
        select(resolved(tmp_path, GRID), ["beta*"])
