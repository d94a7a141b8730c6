"""Points of scaling laws from run directories and tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_kd.config import ConfigError, ModelSection
from megatron_kd.planning.parameters import parameter_count
from megatron_kd.sweep.scaling.fit import ScalingPoint
from megatron_kd.sweep.scaling.points import read_run, read_table
from megatron_kd.telemetry.run_files import RunWriter

MODEL = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_attention_heads": 4,
    "ffn_hidden_size": 96,
    "vocab_size": 300,
}


def write_run(folder: Path, loss: float, *, steps: int = 40, teacher: Path | None = None) -> Path:
    with RunWriter(folder, tensorboard=False, enabled=True) as writer:
        writer.begin(step=0, steps=40)
        for step in (20, 40):
            writer.write_metrics(
                {"step": step, "ce_loss": 9.0, "tokens": step * 1000, "tokens_per_second": 1.0}
            )
            writer.write_metrics(
                {
                    "step": step,
                    "split": "books",
                    "ce_loss": loss + 40 - step,
                    "kd_loss": 0.5,
                    "tokens": step * 1000,
                }
            )
    lines = [
        "[model]",
        *(f"{key} = {value}" for key, value in MODEL.items()),
        "[train]",
        f"steps = {steps}",
        "[teacher]",
    ]
    lines += (
        ['source = "none"']
        if teacher is None
        else ['source = "online"', f'checkpoint = "{teacher}"']
    )
    (folder / "config.toml").write_text("\n".join(lines))
    return folder


def test_points_of_runs(tmp_path: Path) -> None:
    teacher = write_run(tmp_path / "teacher", 2.0)
    model = ModelSection.model_validate(MODEL)
    alone = read_run(teacher)
    assert alone == ScalingPoint(
        parameter_count(model, 300) - 300 * 64 * (1 if model.tied_embeddings else 2),
        40_000.0,
        2.0,
        None,
    )
    student = write_run(tmp_path / "student", 3.0, teacher=teacher)
    assert read_run(student, split="books").teacher_loss == 2.0
    early = write_run(tmp_path / "early", 3.0, teacher=teacher / "checkpoints/step-00000020")
    assert read_run(early).teacher_loss == 22.0
    unmeasured = write_run(tmp_path / "unmeasured", 3.0, teacher=tmp_path / "elsewhere/model")
    with pytest.raises(ConfigError, match="has no metrics.jsonl: measure it on books"):
        read_run(unmeasured)
    measured = {
        "checkpoint": str(tmp_path / "elsewhere/model/checkpoints/step-00000009"),
        "results": {"books": {"cross_entropy": 1.5}},
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(measured))
    assert read_run(unmeasured, evaluations=[tmp_path / "evaluation.json"]).teacher_loss == 1.5
    with pytest.raises(ConfigError, match="last validated at step 40 of 50"):
        read_run(write_run(tmp_path / "going on", 3.0, steps=50))
    with pytest.raises(ConfigError, match="no validation losses of code"):
        read_run(teacher, split="code")


def test_tables(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "parameters,tokens,loss,teacher_loss\n1e9,2e10,2.5,\n1e9,2e10,2.4,2.1\n"
    )
    (tmp_path / "a.json").write_text(json.dumps([{"parameters": 1e9, "tokens": 2e10, "loss": 2.5}]))
    assert read_table(tmp_path / "a.csv") == [
        ScalingPoint(1e9, 2e10, 2.5),
        ScalingPoint(1e9, 2e10, 2.4, 2.1),
    ]
    assert read_table(tmp_path / "a.json") == [ScalingPoint(1e9, 2e10, 2.5)]
    for text, sentence in (
        ("parameters,loss\n1,2\n", "run 1 has no tokens"),
        ("parameters,tokens,loss\n1,x,2\n", "tokens = 'x'"),
        ("", "at least one"),
    ):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(ConfigError, match=sentence):
            read_table(tmp_path / "bad.csv")
