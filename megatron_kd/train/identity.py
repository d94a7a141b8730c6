"""What a teacher that is still training is called: a digest of all in its run file that decides its weights, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kd.cache import CacheReader, WrongCache
from megatron_kd.checkpoint.store import checkpoint_digest, find_checkpoint
from megatron_kd.config import RunConfig, Section
from megatron_kd.config.durable import write_atomically
from megatron_kd.data.indexed import read_index
from megatron_kd.parallel.collectives import from_rank_zero
from megatron_kd.train.inputs import Inputs

RUN_FILE = "teacher.txt"
_BLOCKS, _BLOCK_BYTES = 64, 1 << 16
_INITIAL = "checkpoint.initialize_from"
# Layout and schedules change roundings, never what is computed.
_DISTILL_LAYOUT = {"head_schedule", "chunk_tokens"}


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
            return "".join(f"{key} = {json.dumps(value, sort_keys=True)}\n" for key, value in sorted(settings.items()))

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
        raise WrongCache(f"{directory} holds the targets of another training run ({'; '.join(wrong)}): choose another directory")


def _lines(text: str) -> dict[str, str]:
    return dict(line.split(" = ", 1) for line in text.splitlines())


def _settings(config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    found: dict[str, Any] = {"model.vocab_size": inputs.vocab_size, "data.tokenizer": inputs.digest}
    found |= _changed("model", config.model, leave={"recompute", "vocab_size"})
    found |= _changed("batch", config.batch, leave={"micro_batch_size"})
    found |= _changed("optimizer", config.optimizer, leave={"distributed"})
    train = config.train
    found |= {"train.steps": train.steps, "train.seed": train.seed, "train.precision": train.precision}
    found |= _changed("data", config.data, leave={"tokenizer", "train", "valid", "index_cache"})
    found["data.train"] = [_data_digest(prefix) for prefix in config.data.train]
    if config.teacher.source == "none":
        return found | {"distill.z_loss": config.distill.z_loss} if config.distill.z_loss else found
    found |= _changed("distill", config.distill, leave=_DISTILL_LAYOUT)
    if inputs.teacher is not None:
        found["teacher.checkpoint"] = checkpoint_digest(inputs.teacher[0])
    if config.teacher.source == "cached":
        found["teacher.cache"] = json.loads(CacheReader(str(config.teacher.cache)).identity.to_json())
    return found


def _changed(name: str, section: Section, *, leave: set[str]) -> dict[str, Any]:
    """Values of a section's keys that are not the default, all but `leave`, as in a run file."""
    fields, values = type(section).model_fields, section.model_dump(mode="json")
    defaults = {key: field.get_default(call_default_factory=True) for key, field in fields.items()}
    return {f"{name}.{key}": values[key] for key in fields if key not in leave and getattr(section, key) != defaults[key]}


def _initial(config: RunConfig, inputs: Inputs, directory: Path) -> dict[str, Any]:
    """The weights that the run began with. Once it goes on from its own, only what was noted at its beginning is sure."""
    if config.checkpoint.initialize_from is None:
        return {}
    path = directory / RUN_FILE
    if inputs.resume is not None and path.exists():
        noted = _lines(path.read_text(encoding="utf-8"))
        return {_INITIAL: json.loads(noted[_INITIAL])} if _INITIAL in noted else {}
    return {_INITIAL: checkpoint_digest(inputs.initial or find_checkpoint(config.checkpoint.initialize_from, what=_INITIAL))}


def _data_digest(prefix: str) -> str:
    """SHA-256 over the lengths of the documents and 64 evenly spaced blocks of the tokens; all of them where they are few."""
    index = read_index(prefix)
    total = hashlib.sha256(index.lengths.tobytes())
    with open(f"{prefix}.bin", "rb") as stream:
        for start in _block_starts(index.num_tokens * index.dtype.itemsize):
            stream.seek(start)
            total.update(stream.read(_BLOCK_BYTES))
    return total.hexdigest()


def _block_starts(size: int) -> Iterator[int]:
    last = max(size - _BLOCK_BYTES, 0)
    yield from sorted({int(start) for start in np.linspace(0, last, _BLOCKS)})
