"""Rates and bandwidths of a machine from runs measured on it, so that a plan rests on what it does and not on its data sheet.

What bench_step measures in one layout (a plain step, a bare teacher forward) gives two rates: those with which this model's seconds are
the measured ones. Links and memory are measured apart. Nothing is fitted to a run that is then predicted.

File: {"kind": "megatron_kd calibration", "device", "world", "intra_bandwidth", "memory_bandwidth", "row_bandwidth" (bytes/s), "latency"
(s), "settings" (bench_step's), "runs": [{"kind": "plain" | "teacher" | "online" | "cached", "student": {"tensor", "pipeline", ...},
"teacher": {...} or null, "world", "seconds": {"median", "min", "max"}}]}
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_kd.config import ConfigError, RunConfig
from megatron_kd.planning.hardware import Cluster
from megatron_kd.planning.memory import Job
from megatron_kd.planning.step_time import Rates, StepTime, step_time, student_time, teacher_time

KIND = "megatron_kd calibration"
_RATES = (1e3, 1e18)  # FLOP/s between which rates are looked for


@dataclass(frozen=True)
class Calibration:
    """rates: FLOP/s of one rank. spread: largest over smallest rate of the runs, student's and teacher's. cluster: the machine measured."""

    rates: Rates
    spread: tuple[float, float]
    cluster: Cluster
    settings: Mapping[str, Any]
    device: str

    def predict(self, job: Job, cluster: Cluster | None = None) -> StepTime:
        """The step of another run, on this machine or on another number of such."""
        return step_time(job, cluster or self.cluster, self.rates)


def read_calibration(path: Path) -> dict[str, Any]:
    """The file's content. ConfigError where it is not a calibration."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"calibration {path} does not exist: make one with tools/plan.py calibrate --output {path}"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"calibration {path} cannot be read: {error}") from None
    needed = (
        "world",
        "intra_bandwidth",
        "memory_bandwidth",
        "row_bandwidth",
        "latency",
        "settings",
        "runs",
    )
    missing = [name for name in needed if not isinstance(found, dict) or name not in found]
    if missing or found.get("kind") != KIND:
        what = f"has no {missing[0]}" if missing else f"is not of kind {KIND}"
        raise ConfigError(f"calibration {path} {what}: make it with tools/plan.py calibrate")
    return found


def calibrate(found: Mapping[str, Any], *, statistic: str = "median") -> Calibration:
    """Rates from the file's plain and teacher runs; online and cached ones are left alone. ConfigError where there are none of a kind.

    statistic: which of a run's seconds counts: "median", or "min", the round that other processes disturbed least.
    """
    device = (
        "cuda"
        if "cuda" in str(found["settings"].get("device"))
        or not str(found.get("device", "")).startswith("CPU")
        else "cpu"
    )
    cluster = measured_cluster(found, device)
    rates: dict[str, list[float]] = {"plain": [], "teacher": []}
    for run in found["runs"]:
        if run["kind"] not in rates or run["world"] != found["world"]:
            continue
        job, seconds = bench_job(found["settings"], run, device), run["seconds"][statistic]
        rates[run["kind"]].append(rate_of(_timed(job, cluster, run["kind"]), seconds, run["kind"]))
    for kind, several in rates.items():
        if not several:
            raise ConfigError(
                f'the calibration has no run of kind "{kind}" on all of its {found["world"]} ranks: measure it again'
            )
    middle = {
        kind: math.exp(sum(map(math.log, several)) / len(several))
        for kind, several in rates.items()
    }
    spread = (
        max(rates["plain"]) / min(rates["plain"]),
        max(rates["teacher"]) / min(rates["teacher"]),
    )
    return Calibration(
        Rates(middle["plain"], middle["teacher"]),
        spread,
        cluster,
        found["settings"],
        str(found.get("device", "")),
    )


def measured_cluster(found: Mapping[str, Any], device: str) -> Cluster:
    """The machine of a calibration: one node."""
    return Cluster(
        ranks=int(found["world"]),
        gpus_per_node=int(found["world"]),
        memory=math.inf,
        peak=1.0,
        memory_bandwidth=float(found["memory_bandwidth"]),
        intra=float(found["intra_bandwidth"]),
        inter=float(found["intra_bandwidth"]),
        latency=float(found["latency"]),
        framework=0.0,
        device="cuda" if device == "cuda" else "cpu",
        name=str(found.get("device", "")),
        measured_row_bandwidth=float(found["row_bandwidth"]),
    )


def _timed(job: Job, cluster: Cluster, kind: str) -> Callable[[float], float]:
    """This model's seconds of a run as a function of the rate."""
    if kind == "teacher":
        return lambda rate: teacher_time(job, cluster, rate, bare=True)
    return lambda rate: sum(student_time(job, cluster, rate).values())


def rate_of(timed: Callable[[float], float], seconds: float, kind: str) -> float:
    """The rate at which `timed` takes `seconds`. ConfigError where messages alone take longer."""
    low, high = _RATES
    if timed(high) >= seconds:
        raise ConfigError(
            f"a measured {kind} run of {seconds:.3f} s is shorter than its messages and passes over memory alone ({timed(high):.3f} s): "
            "measure links and runs again, on an idle machine"
        )
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if timed(middle) > seconds else (low, middle)
    return math.sqrt(low * high)


def bench_job(settings: Mapping[str, Any], run: Mapping[str, Any], device: str) -> Job:
    """What tools/bench_step.py runs with these settings, laid out as `run` says."""

    def model(prefix: str) -> dict[str, Any]:
        hidden = settings[f"{prefix}hidden"]
        shape = {"hidden_size": hidden, "num_layers": settings[f"{prefix}layers"]}
        return {
            **shape,
            "num_attention_heads": hidden // 32,
            "ffn_hidden_size": 3 * hidden,
            "vocab_size": settings["vocab"],
        }

    layout = {key: value for key, value in run["student"].items() if key != "data"}
    content: dict[str, Any] = {
        "model": model(""),
        "data": {"train": ["none"]},
        "batch": {
            "global_batch_size": settings["batch"],
            "micro_batch_size": settings["micro_batch"],
            "sequence_length": settings["sequence"],
        },
        "optimizer": {"learning_rate": 1e-4},
        "parallel": layout,
        "train": {"steps": 1, "precision": settings["precision"]},
        "distill": {"top_k": settings["top_k"], "tail": "bucket"},
        "run": {"directory": "none"},
    }
    own = run.get("teacher")
    if run["kind"] in ("online", "teacher"):
        content["teacher"] = {"source": "online", "checkpoint": "none"}
    if own:
        content["teacher"]["parallel"] = {
            key: own[key] for key in ("tensor", "pipeline") if own.get(key)
        }
        content["teacher"]["micro_batch_size"] = own.get("micro_batch_size") or settings.get(
            "teacher_micro_batch"
        )
    config = RunConfig.model_validate(content)
    teacher = (
        config.model.model_validate(model("teacher_"))
        if run["kind"] in ("online", "teacher")
        else None
    )
    return Job(config, settings["vocab"], teacher, device)


def bench_runs(result: Mapping[str, Any], world: int) -> list[dict[str, Any]]:
    """The runs in a result of tools/bench_step.py on `world` ranks, in the form of a calibration's."""
    settings = result["settings"]
    student = {"tensor": settings["tensor"], "pipeline": settings["pipeline"]}
    own = {"tensor": settings["teacher_tensor"], "pipeline": settings["teacher_pipeline"]}
    own["micro_batch_size"] = settings["teacher_micro_batch"]
    teacher = own if any(value is not None for value in own.values()) else None
    return [
        {
            "kind": kind,
            "student": student,
            "teacher": None if kind == "plain" else teacher,
            "world": world,
            "seconds": seconds,
        }
        for kind, seconds in result["seconds"].items()
        if kind in ("plain", "online", "teacher")
    ]
