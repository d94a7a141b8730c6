"""What a teacher that is still training is called: a digest of all in its run file that decides its weights, and nothing else."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_kd.cache import CacheReader, WrongCache
from megatron_kd.checkpoint.store import checkpoint_digest, find_checkpoint
from megatron_kd.config import RunConfig
from megatron_kd.parallel.collectives import from_rank_zero
from megatron_kd.storage.atomic_files import write_atomically
from megatron_kd.train.startup.input_checks import Inputs
from megatron_kd.train.startup.run_fingerprint import student_settings

RUN_FILE = "teacher.txt"
_INITIAL = "checkpoint.initialize_from"


@dataclass(frozen=True)
class RunDescription:
    """text: a line `key = JSON value` for each setting that decides the weights and is not the default; digest: its SHA-256, hex.

    Defaults are left out, so that a later version's new keys leave the digest of a run without them as it is. Data and
    checkpoints stand there by content and not by path.
    """

    text: str

    @property
    def digest(self) -> str:
        """The `teacher` of the cache's identity."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @staticmethod
    def of(config: RunConfig, inputs: Inputs, directory: Path) -> RunDescription:
        """The run's description, by rank 0 for all; `directory`: of the capture. One broadcast; what it raises, every rank does."""

        def describe() -> str:
            settings = {**_settings(config, inputs), **_initial(config, inputs, directory)}
            return "".join(
                f"{key} = {json.dumps(value, sort_keys=True)}\n"
                for key, value in sorted(settings.items())
            )

        return RunDescription(from_rank_zero(describe))


def remember_run(directory: Path, run: RunDescription) -> None:
    """Write the description beside the shards; WrongCache, naming every difference, where another run's stands there."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / RUN_FILE
    if not path.exists():
        write_atomically(path, run.text.encode())
        return
    there, here = (_lines(text) for text in (path.read_text(encoding="utf-8"), run.text))
    wrong = [
        f"{key}: {there.get(key, 'default')} there, {here.get(key, 'default')} here"
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key)
    ]
    if wrong:
        raise WrongCache(
            f"{directory} holds the targets of another training run ({'; '.join(wrong)}): choose another directory"
        )


def _lines(text: str) -> dict[str, str]:
    return dict(line.split(" = ", 1) for line in text.splitlines())


def _settings(config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    found = student_settings(config, inputs)
    if not config.teacher.enabled:
        return found
    if inputs.teacher is not None:
        found["teacher.checkpoint"] = checkpoint_digest(inputs.teacher[0])
    if config.teacher.reads_cache:
        found["teacher.cache"] = json.loads(
            CacheReader(str(config.teacher.cache)).identity.to_json()
        )
    return found


def _initial(config: RunConfig, inputs: Inputs, directory: Path) -> dict[str, Any]:
    """The weights that the run began with. Once it goes on from its own, only what was noted at its beginning is sure."""
    if config.checkpoint.initialize_from is None:
        return {}
    path = directory / RUN_FILE
    if inputs.resume is not None and path.exists():
        noted = _lines(path.read_text(encoding="utf-8"))
        return {_INITIAL: json.loads(noted[_INITIAL])} if _INITIAL in noted else {}
    return {
        _INITIAL: checkpoint_digest(
            inputs.initial or find_checkpoint(config.checkpoint.initialize_from, what=_INITIAL)
        )
    }
