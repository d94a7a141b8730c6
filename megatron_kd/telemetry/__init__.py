"""What a run measures and writes: metrics, FLOPs, throughput, files and progress."""

from megatron_kd.telemetry.flops import flops_per_token, measure_peak_tflops, parameter_count, peak_tflops
from megatron_kd.telemetry.metrics import METRICS, Metric, reduce_reports
from megatron_kd.telemetry.progress import Progress
from megatron_kd.telemetry.throughput import Lap, Stopwatch
from megatron_kd.telemetry.writer import RunWriter

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
