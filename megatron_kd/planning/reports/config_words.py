"""Complete the command-line words of a tool that needs only part of a run file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_kd.config import RunConfig, load_config

# Values of required keys that neither FLOPs nor memory depend on.
_PLACEHOLDERS = {
    "--data.train": "none",
    "--batch.micro_batch_size": "1",
    "--batch.sequence_length": "4096",
    "--optimizer.learning_rate": "1e-4",
    "--train.steps": "1",
    "--run.directory": "none",
}


def overridden_keys(overrides: Sequence[str]) -> set[str]:
    """Return the keys that override words set, with their leading dashes."""
    return {word.partition("=")[0] for word in overrides if word.startswith("--")}


def load_with_defaults(overrides: Sequence[str], defaults: Mapping[str, str]) -> RunConfig:
    """Load a configuration without a run file.

    Args:
        overrides: words --section.key value, which win.
        defaults: values of other keys, by --section.key, before those of required keys.

    Raises:
        ConfigError: if a value is not valid.
    """
    keys = overridden_keys(overrides)
    words = [
        word
        for key, value in (_PLACEHOLDERS | dict(defaults)).items()
        if key not in keys
        for word in (key, value)
    ]
    return load_config([*words, *overrides])


def load_run_file(path: str, preset: str | None, overrides: Sequence[str]) -> RunConfig:
    """Load a run file, with the model of a preset in place of its own.

    Args:
        path: the run file.
        preset: name of a preset, or None.
        overrides: words --section.key value, which win.

    Raises:
        ConfigError: if the file or a value is not valid.
    """
    model = ["--model.preset", preset] if preset else []
    return load_config(["--config", path, *model, *overrides])
