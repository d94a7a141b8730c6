"""Validate the values of a run file and its overrides, and word every problem."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_kd.config.errors import ConfigError
from megatron_kd.config.keys import COMMAND_LINE, KEYS, SECTIONS, allowed_values, value_type
from megatron_kd.config.run_config import RunConfig


def validate(
    values: Mapping[str, Any], overrides: Mapping[str, Any], path: str | None
) -> RunConfig:
    """Return the RunConfig of a run file's values with overrides on top.

    The file's values are first checked alone and strictly, including those that an override
    replaces: in TOML "64" is no number, while on the command line the text 64 is one.

    Args:
        values: dotted key -> value, from the run file.
        overrides: dotted key -> value, from the command line.
        path: path of the run file, None without one.

    Raises:
        ConfigError: with one line per problem.
    """
    problems = _file_problems(values, path)
    tree = _nest({**values, **overrides})
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as validation_error:
        for error in validation_error.errors():
            _add_problem(problems, error, values, overrides, path)
    if problems:
        raise ConfigError("\n".join(problems.values()))
    return config


def _file_problems(values: Mapping[str, Any], path: str | None) -> dict[str, str]:
    """Return dotted key -> message for values of the wrong type or out of range in the file."""
    problems: dict[str, str] = {}
    try:
        RunConfig.model_validate_json(json.dumps(_nest(values), default=str), strict=True)
    except ValidationError as validation_error:
        for error in validation_error.errors():
            if error["type"] not in ("missing", "value_error"):
                key = _key_of(error)
                problems[key] = _invalid(key, values[key], f"in {path}") + _entry_detail(error)
    for key, value in values.items():
        # pathlib would read an empty path as the working directory.
        if value == "" and value_type(KEYS[key]) is Path:
            problems[key] = _invalid(key, value, f"in {path}")
    return problems


def _add_problem(
    problems: dict[str, str],
    error: ErrorDetails,
    values: Mapping[str, Any],
    overrides: Mapping[str, Any],
    path: str | None,
) -> None:
    """Add the message of one validation error to `problems`, unless its key has a message."""
    key, detail = _key_of(error), _entry_detail(error)
    if error["type"] == "value_error":
        # The message of a section's check begins with a field's name; add the section's name.
        for sentence in str(error["ctx"]["error"]).splitlines():
            problems[sentence] = f"{key}.{sentence}" if key else sentence
    elif error["type"] == "missing" and not detail:
        remedy = (
            f"in {path} or with --{key}"
            if path
            else f"with --{key}, or give a run file with --config"
        )
        problems[key] = f"{key} is missing: set it to {allowed_values(KEYS[key])} {remedy}"
    elif key in overrides:
        value = overrides[key]
        is_text = isinstance(value, str)
        message = _invalid(key, value, COMMAND_LINE, quote=not is_text)
        problems.setdefault(key, message + detail)
    else:
        problems.setdefault(key, _invalid(key, values[key], f"in {path}") + detail)


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested tables of dotted keys.

    Required sections are always present, so that pydantic reports a missing key and not a missing
    section.
    """
    tree: dict[str, Any] = {
        key: {} for key, field in SECTIONS.items() if field.is_required() and "." not in key
    }
    for key, value in flat.items():
        table = tree
        *parents, name = key.split(".")
        for parent in parents:
            table = table.setdefault(parent, {})
        table[name] = value
    return tree


def _key_of(error: ErrorDetails) -> str:
    """Return the dotted key of a pydantic error, without the position in a list or table."""
    path: list[str] = []
    for part in error["loc"]:
        if ".".join(path) in KEYS:
            break
        path.append(str(part))
    return ".".join(path)


def _entry_detail(error: ErrorDetails) -> str:
    """Return what is wrong with an entry of a list of tables; "" for any other error."""
    key = _key_of(error)
    position = error["loc"][len(key.split(".")) :]
    if key not in KEYS or len(position) < 2 or not isinstance(position[0], int):
        return ""
    message = error["msg"][:1].lower() + error["msg"][1:]
    return f" (entry {position[0] + 1}, {'.'.join(map(str, position[1:]))}: {message})"


def _invalid(key: str, value: Any, source: str, *, quote: bool = True) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str) if quote else value
    return f"{key} must be {allowed_values(KEYS[key])}, got {text} {source}"
