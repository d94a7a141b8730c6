"""Declare the [checkpoint] section of a run file."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from megatron_kd.config.sections.section import Section


class CheckpointSection(Section):
    """Choose when checkpoints are saved and where a run starts from."""

    interval: int = Field(default=0, ge=0)
    """Steps between checkpoints. 0: only at the end."""
    keep_last: int = Field(default=2, gt=0)
    """Number of newest checkpoints to keep. Older ones are deleted only after one of these has been
    read back and verified.
    """
    asynchronous: bool = False
    """Continue training while a checkpoint is written. Needs CPU memory for a copy of each rank's
    state.
    """
    timeout_seconds: float = Field(default=1800.0, gt=0)
    """Longest time for one rank's part of a save, seconds. After it the run stops and reports which
    rank was writing which file.
    """
    initialize_from: Path | None = None
    """Start from the weights of this checkpoint, at step 0 with a new optimizer state. Ignored once
    run.directory holds a checkpoint of this run.
    """
    resume: bool = True
    """Continue from the newest undamaged checkpoint in run.directory. false: refuse a directory
    that holds a checkpoint.
    """
    allow_changes: bool = False
    """Resume although settings, data or the teacher differ from those of the original run.
    checkpoints.jsonl records the differences. train.steps, the parallel layout,
    distill.head_schedule and distill.chunk_tokens may change without this key.
    """
