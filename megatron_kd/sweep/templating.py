"""Names in braces, and names of folders."""

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
_ONE = re.compile(r"\{([^{}]*)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Set by the sweep itself.
BUILT_IN = ("seed", "here", "repo", "out", "run", "python")


def as_text(value: Any) -> str:
    """A value inside a longer string, or as a word of a command: true and false as in TOML, lists and tables as JSON."""
    if isinstance(value, bool | list | dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def fill(value: Any, names: Mapping[str, Any], where: str) -> Any:
    """`value` with every {name} replaced, inside lists and tables too; a string that is exactly "{x}" becomes x with its own type.

    {{ and }} stand for braces. ConfigError, naming `where`, for a name that is not known.
    """
    if isinstance(value, list):
        return [fill(item, names, where) for item in value]
    if isinstance(value, dict):
        return {fill(key, names, where): fill(item, names, where) for key, item in value.items()}
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        if match[1] is None:
            raise ConfigError(
                f"{where}: {value!r} has a single brace: write {{{{ and }}}} for braces that name nothing"
            )
        return as_text(_look_up(match[1], names, where))

    whole = _ONE.fullmatch(value)
    return _look_up(whole[1], names, where) if whole else _BRACES.sub(replace, value)


def _look_up(name: str, names: Mapping[str, Any], where: str) -> Any:
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = (
            f"did you mean {{{close[0]}}}?"
            if close
            else f"known are {', '.join(sorted(names))}; {{{{ stands for a brace"
        )
        raise ConfigError(f"{where}: {{{name}}} is not known: {hint}")
    return names[name]


def resolve_variables(variables: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Variables whose texts name each other or what is fixed, {out} for one. ConfigError for circles and reserved or odd names."""
    for name in variables:
        check_name(name, "[variables]")
    found: dict[str, Any] = dict(fixed)
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
            found[name] = fill(waiting.pop(name), found, f"[variables] {name}")
    return found


def check_name(name: str, where: str) -> None:
    """ConfigError where a name cannot stand in braces, or is the sweep's own."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: {name!r} is no name: use letters, digits and _")
    if name in (*BUILT_IN, "seeds", "cells"):
        raise ConfigError(f"{where}: {name} is set by the sweep itself: choose another name")


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
    """name=value of --set: text where the variable is text, else a value as in TOML. ConfigError otherwise."""
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
    """A name as that of a folder: ASCII letters, digits, dots, _ and -, at most 100 of them; "" where nothing is left."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-.")[:100]
