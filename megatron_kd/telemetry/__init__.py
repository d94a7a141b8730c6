"""What a run measures and writes: metrics, FLOPs, throughput, files and progress."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_kd.planning.flops import (
        flops_per_token,
        measure_peak_tflops,
        parameter_count,
        peak_tflops,
    )
    from megatron_kd.telemetry.metrics import METRICS, Metric, reduce_reports
    from megatron_kd.telemetry.progress_bar import Progress
    from megatron_kd.telemetry.run_files import RunWriter
    from megatron_kd.telemetry.throughput import Lap, Stopwatch

__all__ = [
    "METRICS",
    "Lap",
    "Metric",
    "Progress",
    "RunWriter",
    "Stopwatch",
    "flops_per_token",
    "measure_peak_tflops",
    "parameter_count",
    "peak_tflops",
    "reduce_reports",
]

_HOMES = {
    "flops": ("flops_per_token", "measure_peak_tflops", "parameter_count", "peak_tflops"),
    "metrics": ("METRICS", "Metric", "reduce_reports"),
    "progress": ("Progress",),
    "throughput": ("Lap", "Stopwatch"),
    "writer": ("RunWriter",),
}


def __getattr__(name: str) -> Any:
    """A public name, from its module, when it is first asked for: most of them need torch, counting FLOPs and bytes does not."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"megatron_kd.telemetry.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
