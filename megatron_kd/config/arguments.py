"""Parse program arguments into a run file's path and overrides, and print `--help`.

The option parser and `--help` are those of pydantic-settings. No values are checked here: they
leave this module as text, lists and tables.
"""

from __future__ import annotations

import json
from argparse import HelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, Field, create_model
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, CliSettingsSource

from megatron_kd.config.errors import ConfigError
from megatron_kd.config.keys import (
    COMMAND_LINE,
    KEYS,
    RENAMED_KEYS,
    TYPE_WORDS,
    allowed_values,
    is_section,
    renamed_key_notice,
    unknown_key_message,
    value_range,
    value_type,
)
from megatron_kd.config.presets import PRESETS
from megatron_kd.config.run_config import RunConfig

USAGE = "--config run.toml [--section.key value ...]"


@dataclass
class Arguments:
    """Hold the program arguments.

    Attributes:
        path: path of the run file, None without one.
        texts: dotted key -> the texts of its overrides, in order.
        notices: one sentence for each key of an older version.
    """

    path: str | None = None
    texts: dict[str, list[str]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def print_help(prog: str) -> None:
    """Print every key with its type, description and default, and exit with status 0."""
    _option_parser(prog)(args=["--help"])


def split_arguments(argv: Sequence[str]) -> Arguments:
    """Sort program arguments by key.

    Raises:
        ConfigError: an argument is no override, a value is missing, or a key is unknown.
    """
    arguments = Arguments()
    problems: list[str] = []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        key, equals, text = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not key:
            problems.append(f"unexpected argument {token}: write overrides as --section.key value")
            continue
        if not equals and tokens and not tokens[0].startswith("--"):
            text = tokens.pop(0)
        if key in RENAMED_KEYS:
            arguments.notices.append(renamed_key_notice(key, COMMAND_LINE))
            key = RENAMED_KEYS[key]
        if key != "config" and key not in KEYS:
            problems.append(unknown_key_message(key, COMMAND_LINE))
        elif not text:
            problems.append(f"{key} {COMMAND_LINE} needs a value: --{key}=value")
        else:
            arguments.texts.setdefault(key, []).append(text)
    paths = arguments.texts.pop("config", [])
    if len(paths) > 1:
        problems.append(f"--config is given {len(paths)} times: one run has one run file")
    if problems:
        raise ConfigError("\n".join(problems))
    arguments.path = paths[0] if paths else None
    return arguments


def decode_overrides(texts: Mapping[str, list[str]], prog: str) -> dict[str, Any]:
    """Return {dotted key: value} of overrides, with the keys of a preset filled in.

    Numbers and booleans stay text, lists and tables are decoded from JSON, and null is None. A
    preset on the command line wins over the run file, and other overrides win over the preset.

    Raises:
        ConfigError: a list or table is not valid JSON.
    """
    problems = [_repeated_list(key, texts[key]) for key in texts if _mixes_forms(key, texts[key])]
    options = [f"--{key}={_option_text(key, values)}" for key, values in texts.items()]
    parsed = _option_parser(prog)(args=options)()
    overrides: dict[str, Any] = {}
    for key in texts:
        value: Any = parsed
        for name in key.split("."):
            value = value[name]
        if value is not None and get_origin(value_type(KEYS[key])) in (tuple, dict):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                problems.append(
                    f"{key} must be {allowed_values(KEYS[key])} as JSON, got {value} "
                    f"{COMMAND_LINE}: {error.msg}"
                )
        overrides[key] = value
    if problems:
        raise ConfigError("\n".join(problems))
    return {**_preset_overrides(overrides.get("model.preset")), **overrides}


def _preset_overrides(preset: str | None) -> dict[str, Any]:
    values = {} if preset is None else PRESETS.get(preset, {})
    return {f"model.{name}": value for name, value in values.items()}


def _is_null(key: str, values: list[str]) -> bool:
    nullable = NoneType in get_args(KEYS[key].annotation)
    return values == ["null"] or (nullable and values[-1].lower() in ("null", "none"))


def _mixes_forms(key: str, values: list[str]) -> bool:
    """Return True if a list is given both as JSON and entry by entry."""
    is_list = get_origin(value_type(KEYS[key])) is tuple and not _is_null(key, values)
    return is_list and len(values) > 1 and any(text.startswith("[") for text in values)


def _repeated_list(key: str, values: list[str]) -> str:
    return (
        f"{key} is given {len(values)} times {COMMAND_LINE}: give one JSON list, or repeat it with "
        "one entry each"
    )


def _option_text(key: str, values: list[str]) -> str:
    """Return the text of an option as the parser reads it: null, a JSON list or the last value."""
    text = values[-1]
    if _is_null(key, values):
        return "null"
    kind = value_type(KEYS[key])
    if get_origin(kind) is not tuple or text.startswith("["):
        return text
    return f"[{', '.join(values)}]" if is_section(get_args(kind)[0]) else json.dumps(values)


@cache
def _option_parser(prog: str) -> CliSettingsSource[Any]:
    literal: Any = Literal
    description = "Run file (TOML) with sections and keys as below. Overrides win over it."
    config = (literal["path"], Field("unset", description=description))
    source: CliSettingsSource[Any] = CliSettingsSource(
        _option_model(RunConfig, BaseSettings, config=config),
        cli_prog_name=prog,
        cli_avoid_json=True,
        cli_parse_none_str="null",
        cli_use_class_docs_for_groups=True,
        cli_exit_on_error=False,
        formatter_class=HelpFormatter,
    )
    source.root_parser.usage = f"%(prog)s {USAGE}"
    source.root_parser.description = RunConfig.__doc__
    source.root_parser.epilog = (
        "Overrides are --section.key value or --section.key=value. null unsets a key whose default "
        "is unset."
    )
    return source


def _option_model(model: type[BaseModel], base: type[BaseModel], **extra: Any) -> type[Any]:
    """Return a copy of `model` whose types and defaults are the words that `--help` prints."""
    fields: dict[str, Any] = dict(extra)
    literal: Any = Literal
    for name, key in model.model_fields.items():
        kind = value_type(key)
        if is_section(kind):
            fields[name] = (_option_model(kind, BaseModel), ...)
            continue
        choices = get_origin(kind) is Literal
        words = map(str, get_args(kind)) if choices else TYPE_WORDS[kind][0].split(",")
        default = ... if key.is_required() else default_text(key)
        fields[name] = (literal[tuple(words)], Field(default, description=_help_text(key)))
    return create_model(model.__name__, __base__=base, __doc__=model.__doc__, **fields)


def default_text(key: FieldInfo) -> str:
    """Return the default of a key as `--help` prints it."""
    default = key.get_default(call_default_factory=True)
    if default is None:
        return "unset"
    if isinstance(default, str):
        return default
    return json.dumps(default, ensure_ascii=False, default=str)


def _help_text(key: FieldInfo) -> str:
    text, limits = key.description or "", value_range(key)
    if limits and limits not in text:
        text += f" Must be {limits}."
    forms = {
        tuple: " A JSON list; or repeat the option.",
        dict: " A JSON object, '{\"name\": ...}'.",
    }
    return text + forms.get(get_origin(value_type(key)), "")
