"""List the keys of a run file, and describe them and their values in words."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_kd.config.run_config import RunConfig
from megatron_kd.config.sections.hidden_states_pair import HiddenStatesPair

COMMAND_LINE = "on the command line"

# Old dotted key -> new dotted key. An old key is accepted with a notice for one version.
RENAMED_KEYS: dict[str, str] = {}

# Type of a key -> its word in --help, and the description of its values in error messages.
TYPE_WORDS: dict[Any, tuple[str, str]] = {
    bool: ("true,false", "true or false"),
    int: ("integer", "a whole number"),
    float: ("number", "a number"),
    str: ("text", "text"),
    Path: ("path", "a path"),
    tuple[str, ...]: ("list", "a list of text"),
    tuple[float, ...]: ("list", "a list of numbers"),
    tuple[HiddenStatesPair, ...]: (
        "list",
        f"a list of tables of {', '.join(HiddenStatesPair.model_fields)}",
    ),
    dict[str, str]: ("table", "a table of name = text"),
    dict[str, Any]: ("table", "a table of name = value"),
}


def value_type(field: FieldInfo) -> Any:
    """Return the type of a key, without `| None`."""
    members = get_args(field.annotation)
    if NoneType not in members:
        return field.annotation
    return next(member for member in members if member is not NoneType)


def is_section(kind: Any) -> bool:
    """Return True if a type is a section."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield dotted key and field of everything below `model`, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        if is_section(value_type(field)):
            yield from _fields(value_type(field), f"{prefix}{name}.")


SECTIONS = {key: field for key, field in _fields(RunConfig) if is_section(value_type(field))}
KEYS = {key: field for key, field in _fields(RunConfig) if key not in SECTIONS}


def value_range(field: FieldInfo) -> str:
    """Return the numeric range of a key: "> 0", "in [0, 1)", or "" without a range."""
    low = high = ""
    for limit in field.metadata:
        for name, opening in (("gt", "("), ("ge", "[")):
            low = f"{opening}{getattr(limit, name)}" if hasattr(limit, name) else low
        for name, closing in (("lt", ")"), ("le", "]")):
            high = f"{getattr(limit, name)}{closing}" if hasattr(limit, name) else high
    if low and high:
        return f"in {low}, {high}"
    if low:
        return f"{'>' if low[0] == '(' else '>='} {low[1:]}"
    return f"{'<' if high[-1] == ')' else '<='} {high[:-1]}" if high else ""


def allowed_values(field: FieldInfo) -> str:
    """Return what values a key takes, in words."""
    kind = value_type(field)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    lengths = [limit.min_length for limit in field.metadata if hasattr(limit, "min_length")]
    minimum = f"(at least {lengths[0]})" if lengths else ""
    return " ".join(filter(None, [TYPE_WORDS[kind][1], value_range(field), minimum]))


def unknown_key_message(key: str, source: str) -> str:
    """Return the error message for a key that does not exist; it names the nearest key.

    Args:
        key: the unknown dotted key.
        source: COMMAND_LINE or "in FILE".
    """
    table = key.rpartition(".")[0]
    while table and table not in KEYS:
        table = table.rpartition(".")[0]
    if table and get_origin(value_type(KEYS[table])) is dict:
        return (
            f"unknown key {key} {source}: give the whole of {table} as JSON, "
            f"--{table} '{{\"name\": value}}'"
        )
    if key in SECTIONS:
        return f"{key} {source} is a section: override its keys, --{key}.key value"
    nearest = _nearest_key(key, source)
    suggestion = f"did you mean {nearest}?" if nearest else "--help lists every key"
    return f"unknown key {key} {source}: {suggestion}"


def _nearest_key(key: str, source: str) -> str | None:
    """Return an existing key of the same name in another section, else one of similar spelling."""
    name = key.rpartition(".")[2]
    namesakes = [other for other in KEYS if other.rpartition(".")[2] == name]
    existing = [*KEYS, *SECTIONS] + ["config"] * (source == COMMAND_LINE)
    nearest = difflib.get_close_matches(key, namesakes, n=1, cutoff=0.0)
    nearest = nearest or difflib.get_close_matches(key, existing, n=1)
    return nearest[0] if nearest else None


def renamed_key_notice(key: str, source: str) -> str:
    """Return the notice for a key of RENAMED_KEYS; `source`: COMMAND_LINE or "in FILE"."""
    return (
        f"{key} {source} is now called {RENAMED_KEYS[key]}: rename it, the next version refuses "
        "the old name"
    )
