"""From a RunConfig to the text of a run file."""

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
    """The complete run file of `config`: every key, defaults included; keys that are None (unset) are left out.

    Loading the text gives an equal RunConfig. Raises ConfigError where a value has no TOML form (null inside model.mcore).
    """
    return "\n".join(_section_lines(config, "")).lstrip("\n") + "\n"


def section_toml(section: BaseModel, name: str) -> str:
    """One section as the table `name` of a run file."""
    return "\n".join([f"[{name}]", *_section_lines(section, f"{name}.")]) + "\n"


def _section_lines(section: BaseModel, prefix: str) -> list[str]:
    """Lines of a section's own values, then those of its tables and sections: in TOML a header ends the keys of the table before it."""
    lines, tables = [], []
    for name in type(section).model_fields:
        value, key = getattr(section, name), prefix + name
        if isinstance(value, BaseModel):
            tables += ["", f"[{key}]", *_section_lines(value, f"{key}.")]
        elif isinstance(value, dict):
            tables += [
                "",
                f"[{key}]",
                *(
                    f"{_toml_key(entry)} = {_toml_value(item, f'{key}.{entry}')}"
                    for entry, item in value.items()
                ),
            ]
        elif value is not None:
            lines.append(f"{name} = {_toml_value(value, key)}")
    return lines + tables


def _toml_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml_value(name, name)


def _toml_value(value: Any, key: str) -> str:
    """`value` on one line of TOML. ConfigError, naming `key`, for a value TOML cannot hold."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, str | Path):
        # JSON's escapes are TOML's, but TOML also wants DEL escaped.
        text = json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise ConfigError(
                f"{key} is not valid Unicode text: {ascii(str(value))} cannot be written to a run file"
            )
        return text
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml_value(item, key) for item in value)}]"
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_none=True)
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(
                f"{_toml_key(name)} = {_toml_value(item, f'{key}.{name}')}"
                for name, item in value.items()
            )
            + "}"
        )
    given = "null" if value is None else f"a {type(value).__name__}"
    raise ConfigError(
        f"{key} cannot be written to a run file: TOML has no form for {given}, leave the key out"
    )
