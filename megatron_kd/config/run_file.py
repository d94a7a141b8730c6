"""Read a run file into flat values: one for each dotted key."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_kd.config.errors import ConfigError
from megatron_kd.config.keys import (
    KEYS,
    RENAMED_KEYS,
    SECTIONS,
    renamed_key_notice,
    unknown_key_message,
)


def read_run_file(path: str) -> tuple[dict[str, Any], list[str]]:
    """Return {dotted key: value} of a run file, and a notice for each key of an older version.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a section is not a table.
    """
    reader = _Flattener(path)
    reader.visit(_read_toml(path), "")
    if reader.problems:
        raise ConfigError("\n".join(reader.problems))
    return reader.values, reader.notices


def _read_toml(path: str) -> dict[str, Any]:
    """Return nested tables. Raise ConfigError, with line and column, for a file that is no TOML."""
    try:
        text = Path(path).read_bytes().decode()
        return tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"run file {path} does not exist") from None
    except OSError as error:
        raise ConfigError(f"cannot read run file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        position = _end_position(error.object[: error.start].decode())
        raise ConfigError(f"{path} is not valid TOML: it is not UTF-8 (at {position})") from None
    except tomllib.TOMLDecodeError as error:
        reason = str(error).replace("end of document", _end_position(text))
        raise ConfigError(f"{path} is not valid TOML: {reason}") from None


def _end_position(text: str) -> str:
    """Return the position at which a text ends, in the words of tomllib."""
    return f"line {text.count(chr(10)) + 1}, column {len(text) - text.rfind(chr(10))}"


@dataclass
class _Flattener:
    """Collect the values of nested tables, problems and notices."""

    path: str
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def visit(self, table: Mapping[str, Any], prefix: str) -> None:
        for name, value in table.items():
            # A quoted key with a dot is one name, not two.
            self._add(prefix + (f'"{name}"' if "." in name else name), value)

    def _add(self, key: str, value: Any) -> None:
        source = f"in {self.path}"
        if key in RENAMED_KEYS:
            self.notices.append(renamed_key_notice(key, source))
            key = RENAMED_KEYS[key]
        if key in self.values:
            self.problems.append(f"{key} {source} is set twice, once by its old name: remove one")
        elif key in KEYS:
            self.values[key] = value
        elif isinstance(value, dict) and (key in SECTIONS or _has_renamed_keys(key)):
            self.visit(value, f"{key}.")
        elif key in SECTIONS:
            self.problems.append(
                f"{key} {source} must be a section, [{key}] with its keys below, got "
                f"{json.dumps(value, ensure_ascii=False, default=str)}"
            )
        else:
            self.problems.append(unknown_key_message(key, source))


def _has_renamed_keys(section: str) -> bool:
    return any(key.startswith(f"{section}.") for key in RENAMED_KEYS)
