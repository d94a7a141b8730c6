"""Declare the [run] section of a run file."""

from __future__ import annotations

from pathlib import Path

from megatron_kd.config.sections.section import Section


class RunSection(Section):
    """Name the directory of the run."""

    directory: Path
    """Directory for everything that the run writes: config.toml, metrics.jsonl, status.json,
    tensorboard/, checkpoints/.
    """
