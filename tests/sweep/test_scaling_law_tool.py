"""tools/scaling_law.py on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.helpers.tools import run_tools
from tests.losses.cases import fresh_seed
from tests.sweep.scaling_cases import DISTILLED, SUPERVISED, plain_distilled, sample_points


def test_tool(tmp_path: Path) -> None:
    """The tool prints and writes its results; bad input is one sentence."""
    rng = np.random.default_rng(fresh_seed())
    points = [
        *sample_points(rng, 14, 1e-3, teacher=False),
        *sample_points(rng, 14, 1e-3, teacher=True),
    ]
    lines = [
        f"{point.parameters},{point.tokens},{point.loss},{point.teacher_loss or ''}"
        for point in points
    ]
    (tmp_path / "runs.csv").write_text("parameters,tokens,loss,teacher_loss\n" + "\n".join(lines))
    held_names = {
        "supervised": ("alpha", "beta", "gamma"),
        "distillation": ("alpha", "beta", "gamma", "c1", "f1", "d1"),
    }
    truth = {"supervised": SUPERVISED, "distillation": DISTILLED}
    held_words = [
        word
        for law, names in held_names.items()
        for name in names
        for word in ("--hold", f"{law}.{name}={truth[law][name]}")
    ]
    question = ["--parameters", "1e9", "--tokens", "100e9", "--teacher-loss", "2.1"]
    fitted = [
        "scaling_law.py",
        "--points",
        "runs.csv",
        *held_words,
        *question,
        "--resamples",
        "20",
        "--json",
        "law.json",
        "--picture",
        "law.png",
    ]
    published = [
        "scaling_law.py",
        "--published",
        "--preset",
        "llama-3.2-1b",
        "--teacher-preset",
        "llama-3.1-8b",
        *question[2:],
    ]
    bad: dict[str, tuple[list[object], str]] = {
        "nothing": (["scaling_law.py"], "points are needed"),
        "both": (
            ["scaling_law.py", "--published", "--points", "runs.csv"],
            "--published takes no points",
        ),
        "half": (["scaling_law.py", "--published", "--tokens", "1e9"], "needs both --parameters"),
        "hold": (
            ["scaling_law.py", "--points", "runs.csv", "--hold", "gamma=1"],
            "--hold gamma=1 must be LAW.NAME=VALUE",
        ),
        "absent": (["scaling_law.py", "--points", "absent.csv"], "absent.csv does not exist"),
        "preset": (
            ["scaling_law.py", "--published", "--preset", "llama", "--tokens", "1e9"],
            "did you mean",
        ),
    }
    results = run_tools(
        {
            "fitted": fitted,
            "published": published,
            **{name: words for name, (words, _) in bad.items()},
        },
        cwd=tmp_path,
    )
    assert results["fitted"].code == 0, results["fitted"]
    assert "14 runs, missed by" in results["fitted"].out, results["fitted"]
    report = json.loads((tmp_path / "law.json").read_text())
    value = report["predictions"]["distilled"]
    assert value["low"] < value["high"]
    assert abs(value["value"] - float(plain_distilled(1e9, 1e11, 2.1))) < 0.05
    assert report["laws"]["distillation"]["held"]["gamma"] == 0.764
    assert (tmp_path / "law.png").stat().st_size > 10_000
    assert "alone, equal FLOPs" in results["published"].out, results["published"]
    assert "2.430e+21 FLOPs distilled" in results["published"].out, results["published"]
    for name, (_, sentence) in bad.items():
        assert results[name].code == 2, results[name]
        assert sentence in results[name].err, results[name]
        assert len(results[name].err.splitlines()) == 1, results[name]
