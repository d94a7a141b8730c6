"""Declare the [batch] section of a run file."""

from __future__ import annotations

from pydantic import Field

from megatron_kd.config.sections.section import Section


class BatchSection(Section):
    """Set the sizes of one training step, in sequences and tokens."""

    global_batch_size: int = Field(gt=0)
    """Sequences per step over all ranks. A multiple of micro_batch_size * data-parallel size."""
    micro_batch_size: int = Field(gt=0)
    """Sequences per forward pass of one data-parallel rank."""
    sequence_length: int = Field(gt=0)
    """Tokens per sequence. With sequence_parallel, a multiple of parallel.tensor."""
