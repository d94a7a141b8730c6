"""Define the settings that decide a run's weights, by content and not by path.

Two places keep them: each checkpoint (compared when the run is resumed) and the description beside
captured targets (weights_fingerprint.py). Resuming with another top_k, temperature, sequence length
or seed would train a different model without a visible sign.

Only values that differ from the default are kept. So a key that a later version adds leaves the
fingerprint of a run without it unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from megatron_kd.config import RunConfig, Section
from megatron_kd.data.token_digests import token_digest
from megatron_kd.teacher.source import teacher_source
from megatron_kd.train.startup.input_checks import Inputs

# The memory strategy of the head changes rounding only, never what is computed.
_DISTILL_MEMORY_KEYS = {"head_schedule", "chunk_tokens"}
# A run that is extended has the same weights up to here.
MAY_CHANGE_ON_RESUME = frozenset({"train.steps"})


def checkpoint_settings(config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    """Return the settings that each checkpoint of a run keeps.

    Reads blocks of the data and of the teacher. Call it on one rank.

    Returns:
        Key of the run file -> JSON value. Content stands in place of paths.

    Raises:
        ConfigError: The teacher's cache cannot be read.
    """
    teacher = teacher_source(config).run_fingerprint(inputs.teacher)
    return _student_settings(config, inputs) | teacher


def capture_settings(config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    """Return the settings that name the training run in a cache of captured targets.

    They differ from `checkpoint_settings` in the teacher only: its checkpoint is identified by the
    digest of the whole folder, also where it merely stands in for samples missing in a cache.
    Captured caches store the digest of these settings, so the difference has to stay.

    Returns:
        Key of the run file -> JSON value. Content stands in place of paths.
    """
    teacher = teacher_source(config).weights_fingerprint(inputs.teacher)
    return _student_settings(config, inputs) | teacher


def differences(
    stored: Mapping[str, Any], current: Mapping[str, Any], *, ignored: Collection[str] = ()
) -> list[str]:
    """Return one phrase for each setting that changed.

    Args:
        stored: Settings as they were stored. An absent key has its default.
        current: Settings of this run.
        ignored: Keys that may differ.
    """
    return [
        f"{key}: was {_value(stored, key)}, is now {_value(current, key)}"
        for key in sorted({*stored, *current} - set(ignored))
        if stored.get(key) != current.get(key)
    ]


def _value(settings: Mapping[str, Any], key: str) -> str:
    return json.dumps(settings[key]) if key in settings else "the default"


def _student_settings(config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    """Return all settings that decide the weights except the content of the teacher."""
    train, distill = config.train, config.distill
    settings = {
        "model.vocab_size": inputs.vocab_size,
        "data.tokenizer": inputs.digest,
        "data.train": [token_digest(prefix) for prefix in config.data.train],
        "train.steps": train.steps,
        "train.seed": train.seed,
        "train.precision": train.precision,
        **_changed("model", config.model, except_keys={"recompute", "vocab_size"}),
        **_changed("batch", config.batch, except_keys={"micro_batch_size"}),
        **_changed("optimizer", config.optimizer, except_keys={"distributed"}),
        **_changed("data", config.data, except_keys={"tokenizer", "train", "valid", "index_cache"}),
    }
    if config.teacher.enabled:
        return settings | _changed("distill", distill, except_keys=_DISTILL_MEMORY_KEYS)
    return settings | ({"distill.z_loss": distill.z_loss} if distill.z_loss else {})


def _changed(name: str, section: Section, *, except_keys: set[str]) -> dict[str, Any]:
    """Return the values of a section's keys that differ from the default, as in a run file."""
    fields, values = type(section).model_fields, section.model_dump(mode="json")
    defaults = {key: field.get_default(call_default_factory=True) for key, field in fields.items()}
    return {
        f"{name}.{key}": values[key]
        for key in fields
        if key not in except_keys and getattr(section, key) != defaults[key]
    }
