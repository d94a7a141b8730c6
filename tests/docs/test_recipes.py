"""Follow every recipe of CONTRIBUTING.md on a toy example, in a copy of the tree.

Each recipe touches only the files that its table names. The copy holds all toy additions at once.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.recipe_checks import CHECKS, PRELUDE, RUN_FILE
from tests.docs.recipe_toys import TOYS

ROOT = Path(__file__).parents[2]
COPIED = ("megatron_kd", "tools", "examples", "tests", "docs")


def recipes() -> dict[str, str]:
    """Return the recipes of CONTRIBUTING.md: title -> text."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    parts = re.split(r"^### (.+)$", text[text.index("## Recipes") :], flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the tree with every toy addition."""
    copy = tmp_path_factory.mktemp("tree")
    for name in COPIED:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for additions in TOYS.values():
        for name, anchor, text in additions:
            path = copy / name
            if anchor is None:
                assert not path.exists(), name
                path.parent.mkdir(exist_ok=True)
                content = RUN_FILE if text == "RUN_FILE" else text
                path.write_text(content, encoding="utf-8")
                continue
            content = path.read_text(encoding="utf-8")
            assert content.count(anchor) == 1, f"{name}: {anchor!r}"
            path.write_text(content.replace(anchor, text + anchor), encoding="utf-8")
    return copy


@pytest.mark.parametrize("title", TOYS)
def test_recipe_names_its_files(title: str) -> None:
    text = recipes()[title]
    for name, _, _ in TOYS[title]:
        patterns = [name, f"{Path(name).parent}/<", f"{Path(name).parents[1]}/<"]
        assert any(pattern in text for pattern in patterns), f"{title}: {name}"


@pytest.mark.parametrize("title", CHECKS)
def test_recipe_works(title: str, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "toy.toml").write_text(RUN_FILE, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + CHECKS[title], str(tmp_path / "toy.toml")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_of_every_recipe_exist() -> None:
    for title, text in recipes().items():
        for name in re.findall(r"`((?:megatron_kd|tests|examples)/[\w/.]+)`", text):
            assert (ROOT / name).exists(), f"{title}: {name}"


def test_recipes_are_the_promised_ones() -> None:
    titles = " ".join(recipes())
    for word in (
        *("divergence", "loss term", "metric", "token rule", "schedule", "teacher source"),
        *("model family", "tokenizer", "kernel", "plot", "fault", "experiment"),
    ):
        assert word in titles, word
