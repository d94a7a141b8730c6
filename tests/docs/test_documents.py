"""Check the documented commands, code and run files of the README, examples and quickstart."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from megatron_kd.config import ConfigError, load_config
from megatron_kd.parallel.platform import check_apex
from megatron_kd.sweep.definition.grid import resolve

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 120
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    for path in re.findall(r"`((?:tests|tools|examples|megatron_kd)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path


PAGES = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_every_page(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", path.read_text(encoding="utf-8")):
        assert target.startswith("http") or (path.parent / target).exists(), target


TOML_FILES = sorted(
    path for path in (ROOT / "examples").rglob("*.toml") if path.parent.name != "planning"
)
SWEEP_FILES = [
    path for path in TOML_FILES if "sweep" in tomllib.loads(path.read_text(encoding="utf-8"))
]
RUN_FILES = [path for path in TOML_FILES if path not in SWEEP_FILES]


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.name)
def test_run_files_are_valid(path: Path) -> None:
    assert load_config(["--config", str(path)]).train.steps > 0


def test_sweep_files_are_valid(tmp_path: Path) -> None:
    """Resolve the sweeps of the examples and of their page, in full size and with [small]."""
    page = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    (sweep_text,) = re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "grid.toml").write_text(sweep_text)
    (tmp_path / "run.toml").write_text((ROOT / "examples/quickstart/student.toml").read_text())
    for path in (*SWEEP_FILES, tmp_path / "grid.toml"):
        full, small = (resolve(path, tmp_path / "out", small=small) for small in (False, True))
        assert len(full.cells) >= len(small.cells) > 0
        assert small.seeds
    assert [cell.name for cell in small.cells] == ["alpha 0.0", "alpha 0.5"]
    assert len(full.tasks) == 3 + 9
    block = next(
        block
        for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
        if "sweep.py" in block
    )
    commands = [shlex.split(line, comments=True)[1:] for line in block.splitlines()]
    assert [Path(words[0]).name for words in commands] == ["sweep.py"] * 3 + ["report.py"]
    words = [
        word.replace("out", str(tmp_path / "out"))
        if word == "out"
        else word.replace("grid", str(tmp_path / "grid"))
        for word in commands[1]
    ]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("open ") == 12, done.stderr


def test_readme_run_file_is_valid(tmp_path: Path) -> None:
    """Read the README's run file, with a vocabulary in place of a tokenizer."""
    (content,) = blocks("toml")
    run = tmp_path / "run.toml"
    run.write_text(content.replace('tokenizer = "models/teacher"\n', ""), encoding="utf-8")
    config = load_config(["--config", str(run), "--model.vocab_size", "128256"])
    assert config.distill.tail == "bucket"
    assert config.teacher.runs_in_job


def test_plans() -> None:
    """Compare what plan.sh prints with plans.txt beside it."""
    planning = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
    (line,) = [line for line in planning.splitlines() if line.startswith("python tools/plan.py")]
    done = subprocess.run(
        [sys.executable, *shlex.split(line, comments=True)[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "llama-3.2-1b from llama-3.1-8b on 64 x h100" in done.stdout, done.stderr
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "examples/planning/plan.sh")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.stdout == (ROOT / "examples/planning/plans.txt").read_text(), (
        "write plan.sh's output into plans.txt"
    )


@pytest.mark.parametrize(
    "tool",
    [*sorted((ROOT / "tools").glob("*.py")), ROOT / "megatron_kd/pretrain.py"],
    ids=lambda path: path.name,
)
def test_help(tool: Path) -> None:
    arguments = ["-m", "megatron_kd.pretrain"] if tool.name == "pretrain.py" else [str(tool)]
    done = subprocess.run(
        [sys.executable, *arguments, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0
    assert not done.stderr
    assert len(done.stdout) > 200


def test_apex_of_another_project_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="not NVIDIA's apex"):
        check_apex()
    assert "apex" not in sys.modules, "it was run to be looked into"
    (tmp_path / "apex/normalization.py").write_text("")
    importlib.invalidate_caches()
    check_apex()


@pytest.mark.dist
@pytest.mark.timeout(600)
def test_quickstart(tmp_path: Path) -> None:
    """All stages with a hundredth of the steps; a second call finds nothing left to do."""
    command = [
        "bash",
        str(ROOT / "examples/quickstart.sh"),
        "--smoke",
        "--directory",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "student distilled" in done.stdout
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    report = json.loads((tmp_path / "report.json").read_text())
    assert "heldout" in json.dumps(report)
