"""Calibration files, and the rates that follow from them."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_kd.config import ConfigError
from megatron_kd.planning.hardware import Cluster
from megatron_kd.planning.machine_rates import (
    KIND,
    bench_run,
    bench_runs,
    calibrate,
    read_calibration,
)
from megatron_kd.planning.step_time import ComputeRates, step_time, student_time, teacher_time
from tests.planning.cases import RATES

SETTINGS = {
    "device": "auto",
    "precision": "fp32",
    "rounds": 3,
    "hidden": 256,
    "layers": 4,
    "teacher_hidden": 384,
    "teacher_layers": 6,
    "vocab": 8192,
    "sequence": 256,
    "batch": 8,
    "micro_batch": 4,
    "top_k": 64,
    "tensor": 1,
    "pipeline": 1,
    "teacher_tensor": None,
    "teacher_pipeline": None,
    "teacher_micro_batch": None,
}


def calibration_file(rates: ComputeRates, **changes: Any) -> dict[str, Any]:
    """Return a machine that follows the cost model, except for an absurd online step."""
    links: dict[str, Any] = {
        "kind": KIND,
        "device": "CPU",
        "world": 2,
        "latency": 1e-4,
        "intra_bandwidth": 1e9,
        "memory_bandwidth": 2e10,
        "row_bandwidth": 3e9,
    }
    cluster = Cluster(
        2,
        2,
        1e12,
        1.0,
        2e10,
        1e9,
        1e9,
        latency=1e-4,
        framework=0.0,
        device="cpu",
        measured_row_bandwidth=3e9,
    )
    student = {"tensor": 1, "pipeline": 1}
    plain = bench_run(SETTINGS, {"kind": "plain", "student": student}, "cpu")
    teacher = bench_run(SETTINGS, {"kind": "teacher", "student": student}, "cpu")
    seconds = {
        "plain": sum(student_time(plain, cluster, rates.student).values()),
        "teacher": teacher_time(teacher, cluster, rates.teacher, forward_only=True),
        "online": 1e6,
    }
    result = {
        "settings": SETTINGS,
        "seconds": {
            name: {"median": value, "min": value, "max": value} for name, value in seconds.items()
        },
    }
    return {**links, "settings": SETTINGS, "runs": bench_runs(result, 2), **changes}


def test_rates_of_plain_and_teacher_runs() -> None:
    truth = ComputeRates(3e10, 5e10)
    calibration = calibrate(calibration_file(truth))
    assert calibration.rates.student == pytest.approx(truth.student, rel=1e-6)
    assert calibration.rates.teacher == pytest.approx(truth.teacher, rel=1e-6)
    measured = {
        "kind": "online",
        "student": {"tensor": 1, "pipeline": 1},
        "teacher": {"tensor": 2, "pipeline": 1},
        "world": 2,
    }
    run = bench_run(SETTINGS, measured, "cpu")
    expected = step_time(run, calibration.cluster, truth).seconds
    assert calibration.predict(run).seconds == pytest.approx(expected, rel=1e-6)


def test_a_calibration_without_a_teacher_run() -> None:
    content = calibration_file(RATES)
    with pytest.raises(ConfigError, match='no run of kind "teacher"'):
        calibrate({**content, "runs": content["runs"][:1]})


def test_a_calibration_whose_links_are_too_slow() -> None:
    with pytest.raises(ConfigError, match="shorter than its messages"):
        calibrate(calibration_file(RATES, intra_bandwidth=1.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ('{"world": 2}', "has no intra_bandwidth"),
        (json.dumps({**calibration_file(RATES), "kind": "x"}), "is not of kind"),
    ],
    ids=["no JSON", "incomplete", "other kind"],
)
def test_files_that_are_no_calibration(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_calibration(tmp_path / "calibration.json")


def test_a_missing_calibration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="plan.py calibrate --output"):
        read_calibration(tmp_path / "none.json")


@pytest.mark.parametrize("teacher_tensor", [None, 2])
def test_a_planned_benchmark_is_the_one_that_runs(
    tmp_path: Path, teacher_tensor: int | None
) -> None:
    from tools.bench.step import run_config, teacher_section, teacher_shape

    arguments = Namespace(**{**SETTINGS, "teacher_tensor": teacher_tensor, "tensor": 2})
    expected = run_config(arguments, tmp_path, "online", tensor=2, pipeline=1)
    teacher = teacher_tensor and {"tensor": teacher_tensor, "pipeline": None}
    measured = {
        "kind": "online",
        "student": {"tensor": 2, "pipeline": 1},
        "teacher": teacher,
    }
    run = bench_run(vars(arguments), measured, "cpu")
    shape = teacher_shape(arguments, expected.model).model_copy(update={"vocab_size": 8192})
    assert run.teacher == shape
    assert run.config.model == expected.model
    assert run.config.batch == expected.batch
    assert run.config.parallel == expected.parallel
    assert run.config.teacher.parallel == teacher_section(arguments, tmp_path).parallel
    assert run.config.train.precision == expected.train.precision
    assert run.config.distill.top_k == expected.distill.top_k
