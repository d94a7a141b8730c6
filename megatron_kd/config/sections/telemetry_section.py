"""Declare the [telemetry] section of a run file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_kd.config.sections.section import Section


class TelemetrySection(Section):
    """Choose what is measured and where it is written."""

    log_interval: int = Field(default=1, gt=0)
    """Steps between entries of metrics.jsonl and TensorBoard."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Peak performance of one device, 1e12 FLOP/s; MFU is relative to it. Unset: known GPUs by
    name; on CPU a matrix product is timed at the start.
    """
    progress: Literal["auto", "bar", "lines", "off"] = "auto"
    """Progress display. auto: a bar on a terminal, else a line from time to time."""
