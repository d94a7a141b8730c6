"""Derive the rates of a machine from runs measured on it, instead of its data sheet.

bench_step measures a plain step and a bare teacher forward in one layout. They give two rates:
those with which the cost model's seconds are the measured ones. Links and memory are measured
separately. No rate is fitted to a run that is then predicted.

File: {"kind": "megatron_kd calibration", "device", "world", "intra_bandwidth", "memory_bandwidth",
"row_bandwidth" (bytes/s), "latency" (s), "settings" (bench_step's), "runs": [{"kind": "plain" |
"teacher" | "online" | "cached", "student": {"tensor", "pipeline", ...}, "teacher": {...} or null,
"world", "seconds": {"median", "min", "max"}}]}
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
from megatron_kd.planning.planned_run import PlannedRun
from megatron_kd.planning.step_time import (
    ComputeRates,
    StepTime,
    step_time,
    student_time,
    teacher_time,
)

KIND = "megatron_kd calibration"
_LINK_NAMES = ("world", "latency", "intra_bandwidth", "memory_bandwidth", "row_bandwidth")
# FLOP/s between which rates are searched.
_RATE_RANGE = (1e3, 1e18)


@dataclass(frozen=True)
class Calibration:
    """Hold the rates of a measured machine.

    Attributes:
        rates: FLOP/s of one rank.
        spread: largest over smallest rate of the runs, of the student and of the teacher.
        cluster: the measured machine.
        settings: settings of the measured runs.
        device: its name.
    """

    rates: ComputeRates
    spread: tuple[float, float]
    cluster: Cluster
    settings: Mapping[str, Any]
    device: str

    def predict(self, run: PlannedRun, cluster: Cluster | None = None) -> StepTime:
        """Return the time of a step of another run.

        Args:
            run: the run.
            cluster: machines of the same kind; None: the measured one.
        """
        return step_time(run, cluster or self.cluster, self.rates)


def calibration_content(
    links: Mapping[str, Any], steps: Mapping[str, Any], world: int
) -> dict[str, Any]:
    """Return the content of a calibration file.

    Args:
        links: result of tools/measure_links.py.
        steps: result of tools/bench_step.py.
        world: number of ranks of both.
    """
    settings = {
        name: value for name, value in steps["settings"].items() if name not in ("output", "json")
    }
    return {
        "kind": KIND,
        "device": steps["device"],
        "versions": steps["versions"],
        "commit": steps["commit"],
        **{name: links[name] for name in _LINK_NAMES},
        "settings": settings,
        "runs": bench_runs(steps, world),
    }


def read_calibration(path: Path) -> dict[str, Any]:
    """Return the content of a calibration file.

    Raises:
        ConfigError: if the file is not a calibration.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"calibration {path} does not exist: make one with tools/plan.py calibrate --output "
            f"{path}"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"calibration {path} cannot be read: {error}") from None
    needed = ("world", "intra_bandwidth", "memory_bandwidth", "row_bandwidth", "latency")
    missing = [
        name
        for name in (*needed, "settings", "runs")
        if not isinstance(content, dict) or name not in content
    ]
    if missing or content.get("kind") != KIND:
        problem = f"has no {missing[0]}" if missing else f"is not of kind {KIND}"
        raise ConfigError(f"calibration {path} {problem}: make it with tools/plan.py calibrate")
    return content


def calibrate(content: Mapping[str, Any], *, statistic: str = "median") -> Calibration:
    """Return the rates that follow from the plain and teacher runs of a calibration file.

    Online and cached runs are not used, so that they can check the result.

    Args:
        content: the file's content.
        statistic: which of a run's seconds counts: "median", or "min", the round that other
            processes disturbed least.

    Raises:
        ConfigError: if there is no run of one of the two kinds.
    """
    device = _device_of(content)
    cluster = measured_cluster(content, device)
    rates: dict[str, list[float]] = {"plain": [], "teacher": []}
    for measured in content["runs"]:
        kind = measured["kind"]
        if kind not in rates or measured["world"] != content["world"]:
            continue
        run = bench_run(content["settings"], measured, device)
        seconds = measured["seconds"][statistic]
        rates[kind].append(rate_of(_model_seconds(run, cluster, kind), seconds, kind))
    for kind, values in rates.items():
        if not values:
            raise ConfigError(
                f'the calibration has no run of kind "{kind}" on all of its {content["world"]} '
                "ranks: measure it again"
            )
    student, teacher = rates["plain"], rates["teacher"]
    return Calibration(
        ComputeRates(_geometric_mean(student), _geometric_mean(teacher)),
        (max(student) / min(student), max(teacher) / min(teacher)),
        cluster,
        content["settings"],
        str(content.get("device", "")),
    )


def _geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _device_of(content: Mapping[str, Any]) -> str:
    """Return "cuda" or "cpu"."""
    cuda_requested = "cuda" in str(content["settings"].get("device"))
    is_cpu = str(content.get("device", "")).startswith("CPU")
    return "cuda" if cuda_requested or not is_cpu else "cpu"


def measured_cluster(content: Mapping[str, Any], device: str) -> Cluster:
    """Return the machine of a calibration: one node.

    Args:
        content: content of the calibration file.
        device: "cuda" or "cpu".
    """
    return Cluster(
        ranks=int(content["world"]),
        gpus_per_node=int(content["world"]),
        memory=math.inf,
        peak=1.0,
        memory_bandwidth=float(content["memory_bandwidth"]),
        intra=float(content["intra_bandwidth"]),
        inter=float(content["intra_bandwidth"]),
        latency=float(content["latency"]),
        framework=0.0,
        device="cuda" if device == "cuda" else "cpu",
        name=str(content.get("device", "")),
        measured_row_bandwidth=float(content["row_bandwidth"]),
    )


def _model_seconds(run: PlannedRun, cluster: Cluster, kind: str) -> Callable[[float], float]:
    """Return the cost model's seconds of a run as a function of the rate."""
    if kind == "teacher":
        return lambda rate: teacher_time(run, cluster, rate, forward_only=True)
    return lambda rate: sum(student_time(run, cluster, rate).values())


def rate_of(model_seconds: Callable[[float], float], seconds: float, kind: str) -> float:
    """Return the rate at which the cost model takes the measured time.

    Args:
        model_seconds: seconds as a falling function of the rate in FLOP/s.
        seconds: the measured time.
        kind: kind of the run, for the message of an error.

    Raises:
        ConfigError: if messages alone take longer than `seconds`.
    """
    low, high = _RATE_RANGE
    if model_seconds(high) >= seconds:
        raise ConfigError(
            f"a measured {kind} run of {seconds:.3f} s is shorter than its messages and passes "
            f"over memory alone ({model_seconds(high):.3f} s): measure links and runs again, on an "
            "idle machine"
        )
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if model_seconds(middle) > seconds else (low, middle)
    return math.sqrt(low * high)


def bench_run(settings: Mapping[str, Any], measured: Mapping[str, Any], device: str) -> PlannedRun:
    """Return the run that tools/bench_step.py makes.

    Args:
        settings: settings of bench_step.
        measured: entry of "runs", with the layout.
        device: "cuda" or "cpu".
    """
    has_teacher = measured["kind"] in ("online", "teacher")
    layout = {key: value for key, value in measured["student"].items() if key != "data"}
    content: dict[str, Any] = {
        "model": _bench_model(settings, ""),
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
    if has_teacher:
        content["teacher"] = {"source": "online", "checkpoint": "none"}
    separate = measured.get("teacher")
    if separate:
        content["teacher"]["parallel"] = {
            key: separate[key] for key in ("tensor", "pipeline") if separate.get(key)
        }
        micro_batch_size = separate.get("micro_batch_size") or settings.get("teacher_micro_batch")
        content["teacher"]["micro_batch_size"] = micro_batch_size
    config = RunConfig.model_validate(content)
    teacher = None
    if has_teacher:
        teacher = config.model.model_validate(_bench_model(settings, "teacher_"))
    return PlannedRun(config, settings["vocab"], teacher, device)


def _bench_model(settings: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the [model] section of bench_step's student (prefix "") or teacher ("teacher_")."""
    hidden = settings[f"{prefix}hidden"]
    return {
        "hidden_size": hidden,
        "num_layers": settings[f"{prefix}layers"],
        "num_attention_heads": hidden // 32,
        "ffn_hidden_size": 3 * hidden,
        "vocab_size": settings["vocab"],
    }


def bench_runs(result: Mapping[str, Any], world: int) -> list[dict[str, Any]]:
    """Return the entries of "runs" for a result of tools/bench_step.py.

    Args:
        result: what bench_step wrote.
        world: its number of ranks.
    """
    settings = result["settings"]
    student = {"tensor": settings["tensor"], "pipeline": settings["pipeline"]}
    separate = {
        "tensor": settings["teacher_tensor"],
        "pipeline": settings["teacher_pipeline"],
        "micro_batch_size": settings["teacher_micro_batch"],
    }
    has_separate_layout = any(value is not None for value in separate.values())
    teacher = separate if has_separate_layout else None
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
