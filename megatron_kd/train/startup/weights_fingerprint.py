"""Fingerprint the settings that decide a run's weights; it names the teacher of a captured cache.

While a run trains, its weights have no checkpoint yet that could name them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_kd.cache import WrongCache
from megatron_kd.checkpoint.store import checkpoint_digest, find_checkpoint
from megatron_kd.config import RunConfig
from megatron_kd.parallel.collectives import from_rank_zero
from megatron_kd.storage.atomic_files import write_atomically
from megatron_kd.train.startup.input_checks import Inputs
from megatron_kd.train.startup.run_fingerprint import capture_settings, differences

DESCRIPTION_FILE = "teacher.txt"
_INITIAL = "checkpoint.initialize_from"


@dataclass(frozen=True)
class RunDescription:
    """Hold the settings that decide a run's weights, as text.

    Attributes:
        text: A line `key = JSON value` for each setting, sorted by key.
    """

    text: str

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the text, in hex: the `teacher` of the cache's identity."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def settings(self) -> dict[str, Any]:
        """Return key -> value."""
        pairs = (line.split(" = ", 1) for line in self.text.splitlines())
        return {key: json.loads(value) for key, value in pairs}


def describe_run(config: RunConfig, inputs: Inputs, directory: Path) -> RunDescription:
    """Return the description of a run whose targets are captured.

    Args:
        config: The run file.
        inputs: Results of the startup checks.
        directory: Where the targets are captured.

    Collectives:
        One broadcast over the world. Every rank raises what rank 0 raises.
    """
    return from_rank_zero(lambda: _describe(config, inputs, directory))


def record_run(directory: Path, run: RunDescription) -> None:
    """Write the description beside the shards, or check the one that is there.

    Raises:
        WrongCache: The directory holds targets of another run. The message names each difference.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / DESCRIPTION_FILE
    if not path.exists():
        write_atomically(path, run.text.encode())
        return
    changes = differences(_read(path).settings, run.settings)
    if changes:
        raise WrongCache(
            f"{directory} holds the targets of another training run ({'; '.join(changes)}): "
            "choose another directory"
        )


def _describe(config: RunConfig, inputs: Inputs, directory: Path) -> RunDescription:
    settings = capture_settings(config, inputs) | _initial_weights(config, inputs, directory)
    return RunDescription(_to_text(settings))


def _to_text(settings: Mapping[str, Any]) -> str:
    return "".join(
        f"{key} = {json.dumps(value, sort_keys=True)}\n" for key, value in sorted(settings.items())
    )


def _read(path: Path) -> RunDescription:
    return RunDescription(path.read_text(encoding="utf-8"))


def _initial_weights(config: RunConfig, inputs: Inputs, directory: Path) -> dict[str, Any]:
    """Return the digest of the weights that the run began with, under their key of the run file.

    A resumed run takes it from the description: checkpoint.initialize_from may have changed since.
    """
    if config.checkpoint.initialize_from is None:
        return {}
    path = directory / DESCRIPTION_FILE
    if inputs.resume is not None and path.exists():
        settings = _read(path).settings
        return {_INITIAL: settings[_INITIAL]} if _INITIAL in settings else {}
    folder = inputs.initial or find_checkpoint(config.checkpoint.initialize_from, setting=_INITIAL)
    return {_INITIAL: checkpoint_digest(folder)}
