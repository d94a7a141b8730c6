"""What a reader types: the README's commands and code, the run files, the quickstart."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_kd.config import ConfigError, load_config
from megatron_kd.parallel.platform import check_apex

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 200
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    for path in re.findall(r"`((?:tests|tools|examples|megatron_kd)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.toml")), ids=lambda path: path.name)
def test_run_files_are_valid(path: Path) -> None:
    assert load_config(["--config", str(path)]).train.steps > 0


def test_readme_python() -> None:
    (code,) = blocks("python")
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 2, 16, requires_grad=True), torch.randn(200, 16, requires_grad=True)
    names = {"teacher_hidden": torch.randn(6, 2, 24), "teacher_weight": torch.randn(200, 24), "hidden": hidden, "weight": weight}
    names |= {"labels": torch.randint(0, 200, (6, 2)), "group": None}
    exec(code, names)
    assert names["loss"].total.shape == (6, 2) and hidden.grad is not None and weight.grad is not None


def test_readme_tools(tmp_path: Path) -> None:
    """The data commands on a corpus of this project's own words, and the run file's essentials."""
    (tmp_path / "corpus").mkdir()
    for index, source in enumerate(sorted((ROOT / "megatron_kd").rglob("*.py"))):
        (tmp_path / f"corpus/{index}.txt").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    (block,) = [block for block in blocks("bash") if "preprocess_data" in block]
    commands = [line for line in block.splitlines() if line.startswith("python tools/")]
    assert len(commands) == 2
    for line in commands:
        words = shlex.split(line.replace("--vocab-size 32000", "--vocab-size 800").replace("valid=0.01", "valid=0.2"))
        words = [sys.executable, str(ROOT / words[1]), *words[2:]]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "data/train.json").read_text())["vocab_size"] == 800
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n} and {n}?", "response": f"{2 * n}."}) + "\n" for n in range(400))
    )
    (block,) = [block for block in blocks("bash") if "inspect_data" in block]
    for line in block.splitlines():
        words = shlex.split(line.replace("--sequence-length 2048", "--sequence-length 64"))
        words = [str(ROOT / word) if word.startswith(("tools/", "examples/")) else word for word in words[1:]]
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0 and done.stdout, done.stderr
    (essentials,) = blocks("toml")
    run = tmp_path / "run.toml"
    run.write_text(essentials + (ROOT / "examples/quickstart/student.toml").read_text().split("[distill]")[0])
    with pytest.raises(ConfigError, match="missing|required|needs") as error:
        load_config(["--config", str(run)])
    assert "teacher" not in str(error.value) and "distill" not in str(error.value)


@pytest.mark.parametrize("tool", [*sorted((ROOT / "tools").glob("*.py")), ROOT / "megatron_kd/pretrain.py"], ids=lambda path: path.name)
def test_help(tool: Path) -> None:
    arguments = ["-m", "megatron_kd.pretrain"] if tool.name == "pretrain.py" else [str(tool)]
    done = subprocess.run([sys.executable, *arguments, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and not done.stderr and len(done.stdout) > 200


def test_foreign_apex_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="not NVIDIA's apex"):
        check_apex()


@pytest.mark.dist
@pytest.mark.timeout(600)
def test_quickstart(tmp_path: Path) -> None:
    """All stages with a hundredth of the steps; a second call finds nothing left to do."""
    command = ["bash", str(ROOT / "examples/quickstart.sh"), "--smoke", "--directory", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "student distilled" in done.stdout and (tmp_path / "curves.png").stat().st_size > 10_000
    report = json.loads((tmp_path / "report.json").read_text())
    assert "heldout" in json.dumps(report)
