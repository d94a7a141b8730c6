"""Expand {name} placeholders and make folder-safe slugs."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
import unicodedata
from collections.abc import Mapping
from typing import Any

from megatron_kd.config import ConfigError

_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_SINGLE_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Names that the sweep itself sets.
BUILT_IN = ("seed", "here", "repo", "out", "run", "python")


def as_text(value: Any) -> str:
    """Format a value as a part of a longer string or as a word of a command.

    true and false are written as in TOML, lists and tables as JSON.
    """
    if isinstance(value, bool | list | dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def fill(value: Any, names: Mapping[str, Any], location: str) -> Any:
    """Replace every {name} in a value, inside lists and tables too.

    A string that is exactly "{x}" becomes x with its own type. {{ and }} stand for braces.

    Args:
        value: String, list, table, or any other value, which stays as it is.
        names: Values by name.
        location: Place in the sweep file, for the error message.

    Returns:
        A new value; the argument is not changed.

    Raises:
        ConfigError: A name is not known, or a brace stands alone.
    """
    if isinstance(value, list):
        return [fill(item, names, location) for item in value]
    if isinstance(value, dict):
        return {
            fill(key, names, location): fill(item, names, location) for key, item in value.items()
        }
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        if match[1] is None:
            raise ConfigError(
                f"{location}: {value!r} has a single brace: "
                "write {{ and }} for braces that are no placeholder"
            )
        return as_text(_value_of(match[1], names, location))

    single = _SINGLE_PLACEHOLDER.fullmatch(value)
    return _value_of(single[1], names, location) if single else _BRACES.sub(replace, value)


def _value_of(name: str, names: Mapping[str, Any], location: str) -> Any:
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = (
            f"did you mean {{{close[0]}}}?"
            if close
            else f"known are {', '.join(sorted(names))}; {{{{ stands for a brace"
        )
        raise ConfigError(f"{location}: {{{name}}} is not known: {hint}")
    return names[name]


def resolve_variables(variables: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Expand the placeholders of [variables].

    Args:
        variables: Values that may name each other and the fixed names.
        fixed: Values of the built-in names, such as {out}.

    Returns:
        All values by name, the fixed ones first.

    Raises:
        ConfigError: Variables name each other in a circle, or a name is reserved or malformed.
    """
    for name in variables:
        check_name(name, "[variables]")
    values: dict[str, Any] = dict(fixed)
    waiting = dict(variables)
    while waiting:
        ready = {
            name: value
            for name, value in waiting.items()
            if not (_names_in(value) & waiting.keys())
        }
        if not ready:
            raise ConfigError(
                f"[variables]: {', '.join(sorted(waiting))} name each other in a circle"
            )
        for name in ready:
            values[name] = fill(waiting.pop(name), values, f"[variables] {name}")
    return values


def check_name(name: str, location: str) -> None:
    """Raise ConfigError for a name that cannot be a placeholder or that the sweep itself sets."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{location}: {name!r} is no name: use letters, digits and _")
    if name in (*BUILT_IN, "seeds", "cells"):
        raise ConfigError(f"{location}: {name} is set by the sweep itself: choose another name")


def _names_in(value: Any) -> set[str]:
    if isinstance(value, list):
        return set().union(*map(_names_in, value))
    if isinstance(value, dict):
        return set().union(*map(_names_in, [*value, *value.values()]))
    return (
        {match[1] for match in _BRACES.finditer(value) if match[1]}
        if isinstance(value, str)
        else set()
    )


def parse_setting(text: str, variables: Mapping[str, Any]) -> tuple[str, Any]:
    """Parse a name=value of --set: a text for a variable that is a text, else a value as in TOML.

    Raises:
        ConfigError: There is no such variable, or the value is not one of TOML.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text} must be name=value")
    if name not in variables:
        close = difflib.get_close_matches(name, variables, n=1)
        known = (
            f"did you mean {close[0]}?"
            if close
            else f"the sweep file has {', '.join(variables) or 'none'}"
        )
        raise ConfigError(f"--set {name}: no such variable: {known}")
    if isinstance(variables[name], str):
        return name, value
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        raise ConfigError(
            f"--set {name}: {value!r} is not a value as in TOML, such as {as_text(variables[name])}"
        ) from None


def slug(name: str) -> str:
    """Make a folder name of ASCII letters, digits, dots, _ and -, of at most 100 characters.

    Returns:
        The folder name, or "" for a name without such characters.
    """
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-.")[:100]
