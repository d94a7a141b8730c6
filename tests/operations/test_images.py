"""The images' files, as far as they can be checked without building the images."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docker.keep_base import changed, kept

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
# The environment of the tests comes first.
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
FILES = [DOCKER / "Dockerfile", DOCKER / "Dockerfile.cpu"]


def run(*words: str, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": PATH, **changes}
    return subprocess.run(
        [str(DOCKER / "entrypoint.sh"), *words],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_dockerfiles(path: Path) -> None:
    done = subprocess.run(
        [f"{Path(sys.executable).parent}/hadolint", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout
    text = path.read_text(encoding="utf-8")
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    (base,) = re.findall(r"^ARG BASE=(\S+)$", text, re.MULTILINE)
    assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", base), f"{base} is not pinned"
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE) == ["1000"]


@pytest.mark.parametrize("name", ["entrypoint.sh", "build.sh"])
def test_scripts(name: str) -> None:
    done = subprocess.run(
        [f"{Path(sys.executable).parent}/shellcheck", str(DOCKER / name)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout
    assert os.access(DOCKER / name, os.X_OK)


def test_the_entrypoint_lists_the_tools() -> None:
    done = run("help")
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")}
    assert done.returncode == 0, done.stderr
    assert tools <= set(done.stdout.split()), done.stderr
    assert "megatron-core 0" in done.stdout
    assert run("train_tokenizer", "--help").stdout.startswith("usage: train_tokenizer.py")
    assert "--config" in run("pretrain", "--help").stdout


def test_the_entrypoint_passes_words_signals_and_codes(tmp_path: Path) -> None:
    words = ["a b", "$(touch x)", "'", "*", "\n"]
    assert run("printf", "%s|", *words).stdout == "".join(f"{word}|" for word in words)
    assert run("sh", "-c", "exit 85").returncode == 85
    assert (
        run("sh", "-c", "kill -TERM $$").returncode == -15
    )  # the program itself, no shell in between
    assert run("no_such_program").returncode == 127
    assert run("sh", "-c", 'echo "$HF_HUB_OFFLINE$HF_DATASETS_OFFLINE"').stdout == "11\n"
    assert run("sh", "-c", 'echo "$HF_HUB_OFFLINE"', HF_HUB_OFFLINE="0").stdout == "0\n"
    home = run(
        "sh", "-c", 'touch "$HOME/x" && echo "$TRITON_CACHE_DIR"', HOME=str(tmp_path / "none")
    )
    assert home.returncode == 0, home.stderr
    assert not home.stdout.startswith(str(tmp_path)), home.stderr


def test_build_says_what_is_missing() -> None:
    for words, environment, sentence in (
        ([], {}, "say which image"),
        (["cpu"], {"ENGINE": "no_such_engine"}, "no_such_engine was not found"),
        (["cpu"], {"ENGINE": "true", "BASE": "debian"}, "BASE=debian is for buildah"),
    ):
        done = subprocess.run(
            ["bash", str(DOCKER / "build.sh"), *words],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, **environment},
        )
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert sentence in done.stderr


def test_the_base_image_s_torch_stays() -> None:
    installed = {
        "torch": "2.10.0a0+b4e4",
        "pytorch-triton": "3.5",
        "transformer-engine-torch": "2.10",
        "numpy": "1.26.4",
        "tqdm": "4.0",
        "apex": "0.1",
    }
    constraints = list(
        kept(
            ["# about", "torch==2.13.0", "NumPy==2.4.6", "tqdm==4.70.1", "triton==3.9.0"], installed
        )
    )
    assert "torch==2.10.0a0+b4e4" in constraints
    assert "transformer-engine-torch==2.10" in constraints
    assert "tqdm==4.70.1" in constraints
    assert "# about" in constraints
    assert "torch==2.13.0" not in constraints
    assert "NumPy==2.4.6" not in constraints
    assert "numpy==1.26.4" in constraints
    assert changed(constraints, installed | {"tqdm": "5"}) == []
    (sentence,) = changed(constraints, installed | {"torch": "2.13.0"})
    assert sentence.startswith("torch is 2.13.0, not 2.10.0a0")
