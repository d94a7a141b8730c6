"""Write a run or a section as the text of a run file."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from megatron_kd.config.errors import ConfigError
from megatron_kd.config.run_config import RunConfig


def dump_toml(config: RunConfig) -> str:
    """Return a run file with every key of `config`, defaults included; unset keys are left out.

    Loading the text gives an equal RunConfig.

    Raises:
        ConfigError: a value has no TOML form, such as null inside model.mcore.
    """
    return "\n".join(_section_lines(config, "")).lstrip("\n") + "\n"


def section_toml(section: BaseModel, name: str) -> str:
    """Return one section as the table `name` of a run file."""
    return "\n".join([f"[{name}]", *_section_lines(section, f"{name}.")]) + "\n"


def _section_lines(section: BaseModel, prefix: str) -> list[str]:
    """Return the lines of a section's values, followed by those of its tables and sections.

    In TOML a header ends the keys of the table before it, so values come first.
    """
    values: list[str] = []
    tables: list[str] = []
    for name in type(section).model_fields:
        value, key = getattr(section, name), prefix + name
        if isinstance(value, BaseModel):
            tables += ["", f"[{key}]", *_section_lines(value, f"{key}.")]
        elif isinstance(value, dict):
            tables += ["", f"[{key}]", *_entries(value, key)]
        elif value is not None:
            values.append(f"{name} = {_toml_value(value, key)}")
    return values + tables


def _entries(table: dict[str, Any], key: str) -> list[str]:
    """Return `name = value` for each entry of a table whose dotted key is `key`."""
    return [
        f"{_toml_key(name)} = {_toml_value(value, f'{key}.{name}')}"
        for name, value in table.items()
    ]


def _toml_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml_value(name, name)


def _toml_value(value: Any, key: str) -> str:
    """Return `value` on one line. Raise ConfigError, naming `key`, if TOML cannot hold it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, str | Path):
        return _toml_text(str(value), key)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml_value(item, key) for item in value)}]"
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_none=True)
    if isinstance(value, dict):
        return "{" + ", ".join(_entries(value, key)) + "}"
    kind = "null" if value is None else f"a {type(value).__name__}"
    raise ConfigError(
        f"{key} cannot be written to a run file: TOML has no form for {kind}, leave the key out"
    )


def _toml_text(value: str, key: str) -> str:
    # The escapes of JSON are those of TOML, which also requires one for DEL.
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(
            f"{key} is not valid Unicode text: {ascii(value)} cannot be written to a run file"
        )
    return text
