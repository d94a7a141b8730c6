"""tools/scaling_law.py on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.tools import run_tools
from tests.losses.cases import fresh_seed
from tests.sweep.scaling_cases import DISTILLED, SUPERVISED, plain_distilled, sample_points

TOKENS = ["--tokens", "100e9", "--teacher-loss", "2.1"]
PUBLISHED = ["scaling_law.py", "--published"]
PRESETS = ["--preset", "llama-3.2-1b", "--teacher-preset", "llama-3.1-8b"]
# Words of a command, and a part of the message that they lead to.
BAD_INPUT = {
    "no points": (["scaling_law.py"], "points are needed"),
    "points and published": (
        [*PUBLISHED, "--points", "runs.csv"],
        "--published takes no points",
    ),
    "no parameters": ([*PUBLISHED, "--tokens", "1e9"], "needs both --parameters"),
    "hold without a law": (
        ["scaling_law.py", "--points", "runs.csv", "--hold", "gamma=1"],
        "--hold gamma=1 must be LAW.NAME=VALUE",
    ),
    "no file": (["scaling_law.py", "--points", "absent.csv"], "absent.csv does not exist"),
    "unknown preset": ([*PUBLISHED, "--preset", "llama", "--tokens", "1e9"], "did you mean"),
}


def write_points(path: Path) -> None:
    rng = np.random.default_rng(fresh_seed())
    points = [
        *sample_points(rng, 14, 1e-3, teacher=False),
        *sample_points(rng, 14, 1e-3, teacher=True),
    ]
    lines = [
        f"{point.parameters},{point.tokens},{point.loss},{point.teacher_loss or ''}"
        for point in points
    ]
    path.write_text("parameters,tokens,loss,teacher_loss\n" + "\n".join(lines))


def held_words() -> list[str]:
    """Return options that hold the coefficients for which 14 points are too few."""
    held = {
        "supervised": {name: SUPERVISED[name] for name in ("alpha", "beta", "gamma")},
        "distillation": {
            name: DISTILLED[name] for name in ("alpha", "beta", "gamma", "c1", "f1", "d1")
        },
    }
    return [
        word
        for law, coefficients in held.items()
        for name, value in coefficients.items()
        for word in ("--hold", f"{law}.{name}={value}")
    ]


def test_fitted_laws(tmp_path: Path) -> None:
    write_points(tmp_path / "runs.csv")
    words = ["scaling_law.py", "--points", "runs.csv", *held_words(), "--parameters", "1e9"]
    outputs = ["--resamples", "20", "--json", "law.json", "--picture", "law.png"]
    fitted = run_tools({"fitted": [*words, *TOKENS, *outputs]}, cwd=tmp_path)["fitted"]
    assert fitted.code == 0, fitted
    assert "14 runs, missed by" in fitted.out, fitted
    report = json.loads((tmp_path / "law.json").read_text())
    estimate = report["predictions"]["distilled"]
    assert estimate["low"] < estimate["high"]
    assert abs(estimate["value"] - float(plain_distilled(1e9, 1e11, 2.1))) < 0.05
    assert report["laws"]["distillation"]["held"]["gamma"] == 0.764
    assert (tmp_path / "law.png").stat().st_size > 10_000


def test_published_laws(tmp_path: Path) -> None:
    words = [*PUBLISHED, *PRESETS, *TOKENS]
    published = run_tools({"published": words}, cwd=tmp_path)["published"]
    assert "alone, equal FLOPs" in published.out, published
    assert "2.430e+21 FLOPs distilled" in published.out, published


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_sentence(name: str, tmp_path: Path) -> None:
    write_points(tmp_path / "runs.csv")
    words, sentence = BAD_INPUT[name]
    result = run_tools({name: words}, cwd=tmp_path)[name]
    assert result.code == 2, result
    assert sentence in result.err, result
    assert len(result.err.splitlines()) == 1, result
