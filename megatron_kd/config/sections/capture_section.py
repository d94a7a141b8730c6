"""Declare the [capture] section of a run file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_kd.config.sections.section import Section


class CaptureSection(Section):
    """Store targets of this run's model while it trains, for students to read as teacher.cache.

    [distill] selects what is stored of each token. Steps count finished updates: the samples of
    step n are stored with the targets of the weights of checkpoint step-n.
    """

    directory: Path | None = None
    """Folder of the cache; all ranks must see it. Samples become visible in it with every
    checkpoint. Unset: nothing is captured.
    """
    first_step: int = Field(default=0, ge=0)
    """First step whose samples are stored."""
    last_step: int | None = Field(default=None, ge=0)
    """Last step whose samples are stored. Unset: the last step of the run."""
    interval: int = Field(default=1, gt=0)
    """Store every interval-th step from first_step on."""
    value_encoding: Literal["quantized", "fp32"] = "quantized"
    """Encoding of log-probabilities. quantized: in steps of 1/24 nat. fp32: exact, 4 bytes each."""
    shard_samples: int = Field(default=4096, gt=0)
    """Approximate samples per shard. A shard holds whole steps of one data-parallel rank; a
    checkpoint ends it early.
    """
    queue_mib: int = Field(default=1024, gt=0)
    """Memory for targets that wait to be written, MiB per data-parallel rank. When it is full,
    training waits.
    """

    @model_validator(mode="after")
    def _check(self) -> CaptureSection:
        if self.last_step is not None and self.last_step < self.first_step:
            raise ValueError(
                f"last_step ({self.last_step}) must be at least first_step ({self.first_step})"
            )
        return self

    def steps(self, total: int) -> range:
        """Return the steps whose samples are stored, in a run of `total` steps."""
        last = total - 1 if self.last_step is None else min(self.last_step, total - 1)
        return range(self.first_step, last + 1, self.interval)
