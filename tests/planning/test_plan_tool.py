"""tools/plan.py on the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def plan(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/plan.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


@pytest.fixture
def words(tmp_path: Path) -> list[object]:
    """Return the options of a plan with a price, for 16 GPUs that a file describes."""
    (tmp_path / "cluster.toml").write_text(
        'gpus = 16\ngpu = "h100"\nprice_per_gpu_hour = 2.5\ntokens = 1e11\n'
    )
    models = ["--preset", "llama-3.2-1b", "--teacher-preset", "llama-3.1-8b"]
    return [*models, "--cluster", tmp_path / "cluster.toml", "--show", 3]


def test_text_and_picture(tmp_path: Path, words: list[object]) -> None:
    text = plan(*words, "--picture", tmp_path / "plan.png")
    assert text.returncode == 0, text.stderr
    assert "llama-3.2-1b from llama-3.1-8b on 16 x h100" in text.stdout
    assert "--parallel.tensor" in text.stdout
    assert (tmp_path / "plan.png").stat().st_size > 20_000


def test_json_numbers(words: list[object]) -> None:
    report = json.loads(plan(*words, "--json").stdout)
    assert len(report["layouts"]) == 3
    assert report["budget"]["break_even"] >= 1
    first = report["layouts"][0]
    assert first["seconds"]["step"] == pytest.approx(
        sum(value for name, value in first["seconds"].items() if name != "step")
    )
    assert report["budget"]["online_cost"] == pytest.approx(2.5 * report["budget"]["online_hours"])
    assert report["budget"]["online_hours"] == pytest.approx(
        1e11 / first["tokens_per_second"] * 16 / 3600, rel=1e-3
    )
    fixed = json.loads(plan(*words, "--as-given", "--json", *first["overrides"]).stdout)
    assert fixed["layouts"][0]["seconds"] == first["seconds"]
    assert fixed["layouts"][0]["memory"] == first["memory"]


EIGHT_GPUS = ["--gpus", 8, "--gpu", "h100"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--gpus must be at least 1"),
        (["--gpus", 8], "say which --gpu"),
        (["--gpus", 8, "--gpu", "abacus"], "--gpu abacus is not known"),
        ([*EIGHT_GPUS, "--mfu", 45], r"--mfu must be in \(0, 1\]"),
        ([*EIGHT_GPUS, "--tokens", -1], "--tokens must be above 0"),
        ([*EIGHT_GPUS, "--preset", "lama"], "preset"),
        (
            [*EIGHT_GPUS, "--preset", "llama-3.2-1b", "--teacher-preset", "lama"],
            "teacher-preset.*did you mean",
        ),
        (["--gpus", 1, "--gpu", "l40s", "--preset", "llama-3.1-8b"], "nothing fits"),
        (
            [*EIGHT_GPUS, "--preset", "llama-3.2-1b", "--calibration", "none.json"],
            "none.json does not exist",
        ),
        (["--cluster", "setup.py"], "--cluster setup.py cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_sentence(words: list[object], message: str) -> None:
    process = plan(*words)
    assert process.returncode == 2, process.stderr
    assert re.search(message, process.stderr), process.stderr
    assert len(process.stderr.strip().splitlines()) == 1
    assert not process.stdout


@pytest.mark.parametrize("module", sorted((ROOT / "megatron_kd/planning").rglob("*.py")))
def test_planning_needs_no_torch(module: Path) -> None:
    name = ".".join(module.relative_to(ROOT).with_suffix("").parts)
    code = f"import sys; import {name}; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
