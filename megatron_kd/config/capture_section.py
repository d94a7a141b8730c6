"""The [capture] section of a run file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_kd.config.sections import Section


class CaptureSection(Section):
    """Storing targets of this run's own model while it trains, for students to read as teacher.cache; what is stored: [distill].

    Steps are counted by finished updates: what is stored at step n is what the weights of checkpoint step-n say.
    """

    directory: Path | None = Field(
        default=None,
        description="Folder of the cache, seen by all ranks. Unset: nothing is captured. Samples appear in it with every checkpoint.",
    )
    first_step: int = Field(default=0, ge=0, description="First step whose samples are stored.")
    last_step: int | None = Field(
        default=None,
        ge=0,
        description="Last step whose samples are stored. Unset: the end of the run.",
    )
    interval: int = Field(
        default=1, gt=0, description="Store every interval-th step from first_step on."
    )
    value_encoding: Literal["quantized", "fp32"] = Field(
        default="quantized",
        description="quantized: log-probabilities in steps of 1/24 nat. fp32: exact, 4 bytes each.",
    )
    shard_samples: int = Field(
        default=4096,
        gt=0,
        description="A shard holds whole steps of one data-parallel rank, about this many samples; a checkpoint closes it earlier.",
    )
    queue_mib: int = Field(
        default=1024,
        gt=0,
        description="Memory of targets that wait to be written, MiB for each data-parallel rank; once it is full, training waits.",
    )

    @model_validator(mode="after")
    def _check(self) -> CaptureSection:
        if self.last_step is not None and self.last_step < self.first_step:
            raise ValueError(
                f"last_step ({self.last_step}) must be at least first_step ({self.first_step})"
            )
        return self

    def steps(self, total: int) -> range:
        """The steps whose samples are stored, of a run of `total`."""
        last = total - 1 if self.last_step is None else min(self.last_step, total - 1)
        return range(self.first_step, last + 1, self.interval)
