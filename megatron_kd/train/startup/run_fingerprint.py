"""Settings that decide a run's weights, by content: kept in each checkpoint, compared when the run goes on from it.

A run that goes on with another K, temperature, sequence length or seed looks like the same run in every plot, and is not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kd.cache import CacheError
from megatron_kd.cache.reader import CacheFiles, read_identity
from megatron_kd.config import ConfigError, RunConfig, Section
from megatron_kd.data.token_files import read_index
from megatron_kd.train.startup.input_checks import Inputs

_BLOCKS, _BLOCK_BYTES = 64, 1 << 16
# Layout and schedules change roundings, never what is computed.
_DISTILL_LAYOUT = {"head_schedule", "chunk_tokens"}
# A longer run is the same one so far.
_MAY_CHANGE = {"train.steps"}


def settings_of(config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    """Key -> JSON value of each setting that decides the weights and is not the default. Reads blocks of the data and the teacher.

    Defaults are left out, so that a later version's new keys leave a run without them as it is. Data and checkpoints stand there by
    content and not by path. Called on one rank. ConfigError where the teacher's cache cannot be read.
    """
    found = student_settings(config, inputs)
    if not config.teacher.enabled:
        return found
    if config.teacher.reads_cache:
        try:
            found["teacher.cache"] = json.loads(
                read_identity(CacheFiles(str(config.teacher.cache))).to_json()
            )
        except CacheError as error:
            raise ConfigError(f"teacher.cache: {error}") from error
    elif config.teacher.checkpoint is not None:
        folder = inputs.teacher[0] if inputs.teacher is not None else config.teacher.checkpoint
        found["teacher.checkpoint"] = sampled_digest(folder)
    return found


def student_settings(config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    """`settings_of` without the teacher's content."""
    train = config.train
    found: dict[str, Any] = {"model.vocab_size": inputs.vocab_size, "data.tokenizer": inputs.digest}
    found |= _changed("model", config.model, leave={"recompute", "vocab_size"})
    found |= _changed("batch", config.batch, leave={"micro_batch_size"})
    found |= _changed("optimizer", config.optimizer, leave={"distributed"})
    found |= {
        "train.steps": train.steps,
        "train.seed": train.seed,
        "train.precision": train.precision,
    }
    found |= _changed("data", config.data, leave={"tokenizer", "train", "valid", "index_cache"})
    found["data.train"] = [data_digest(prefix) for prefix in config.data.train]
    if not config.teacher.enabled:
        return found | {"distill.z_loss": config.distill.z_loss} if config.distill.z_loss else found
    return found | _changed("distill", config.distill, leave=_DISTILL_LAYOUT)


def _changed(name: str, section: Section, *, leave: set[str]) -> dict[str, Any]:
    """Values of a section's keys that are not the default, all but `leave`, as in a run file."""
    fields, values = type(section).model_fields, section.model_dump(mode="json")
    defaults = {key: field.get_default(call_default_factory=True) for key, field in fields.items()}
    return {
        f"{name}.{key}": values[key]
        for key in fields
        if key not in leave and getattr(section, key) != defaults[key]
    }


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """In words, each setting that is another one here than where the run began; a setting that is absent has its default."""
    return [
        f"{key}: {json.dumps(there[key]) if key in there else 'the default'} there, "
        f"{json.dumps(here[key]) if key in here else 'the default'} here"
        for key in sorted({*there, *here} - _MAY_CHANGE)
        if there.get(key) != here.get(key)
    ]


def data_digest(prefix: str) -> str:
    """SHA-256 over the lengths of the documents and 64 evenly spaced blocks of the tokens; all of them where they are few."""
    index = read_index(prefix)
    total = hashlib.sha256(index.lengths.tobytes())
    for block in _blocks(Path(f"{prefix}.bin"), index.num_tokens * index.dtype.itemsize):
        total.update(block)
    return total.hexdigest()


def sampled_digest(folder: Path) -> str:
    """SHA-256 over names, sizes and 64 evenly spaced blocks of each of a folder's files: a teacher of 140 GB is not read whole for it."""
    total = hashlib.sha256()
    for path in sorted(
        path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".nfs")
    ):
        total.update(f"{path.name} {path.stat().st_size}\n".encode())
        for block in _blocks(path, path.stat().st_size):
            total.update(block)
    return total.hexdigest()


def _blocks(path: Path, size: int) -> Iterator[bytes]:
    last = max(size - _BLOCK_BYTES, 0)
    with open(path, "rb") as stream:
        for start in sorted({int(start) for start in np.linspace(0, last, _BLOCKS)}):
            stream.seek(start)
            yield stream.read(_BLOCK_BYTES)
