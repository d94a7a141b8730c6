"""Declare the [train] section of a run file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_kd.config.sections.section import Section


class TrainSection(Section):
    """Set the training loop: its length, precision, guards and evaluation."""

    steps: int = Field(gt=0)
    """Optimizer updates in the whole run."""
    seed: int = Field(default=1234, ge=0, lt=2**31)
    """Seed of initial weights, data order and dropout. Initial weights do not depend on the
    parallel layout.
    """
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of weights and activations. bf16 keeps main weights and gradients in fp32."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device to train on. auto: CUDA with NCCL where available, else CPU with gloo."""
    compile_head: bool = False
    """CPU only: compile the elementwise parts of the output head with torch.compile. Needs a C++
    compiler and about 30 seconds at the start.
    """
    nonfinite: Literal["stop", "skip"] = "stop"
    """Action on a loss or gradient that is not finite. stop: end the run. skip: skip the step and
    count it. The weights stay unchanged in both cases.
    """
    max_nonfinite_steps: int = Field(default=10, ge=0)
    """nonfinite = "skip": stop the run after this many skipped steps."""
    loss_spike: float | None = Field(default=None, gt=0)
    """A total_loss this far above the median of the last 100 steps is a spike, nats. Unset: spike
    detection is off.
    """
    on_loss_spike: Literal["warn", "stop"] = "warn"
    """Action on a loss spike. stop: end the run with exit code 93; the last checkpoint is from
    before the spike.
    """
    deterministic: bool = False
    """Make the run reproducible bit for bit. GPU operations without a deterministic implementation
    raise an error, slower operations replace some others, and an NCCL_ALGO that is not
    deterministic is refused.
    """
    minutes: float | None = Field(default=None, gt=0)
    """Save a checkpoint and exit with code 85 this long after the start, minutes. Set it below the
    time limit of the batch system. Unset: no limit.
    """
    evaluate_interval: int = Field(default=0, ge=0)
    """Steps between evaluations on data.valid. 0: only at the end."""
    evaluate_batches: int = Field(default=8, gt=0)
    """Global batches per validation set in one evaluation."""
    timeout_seconds: float = Field(default=600.0, gt=0)
    """Stop the run when a collective operation waits longer than this, seconds."""
