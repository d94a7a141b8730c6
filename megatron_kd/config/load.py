"""From program arguments to a RunConfig.

Two sources and no third: the run file (`--config run.toml`) and dotted overrides (`--section.key value`), which win. Environment
variables and .env files are not read, so that a run is described by its file and its command line alone. The command line and `--help`
go through pydantic-settings' CLI source; all values are checked by RunConfig.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from argparse import HelpFormatter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, CliSettingsSource

from megatron_kd.config.dump import dump_toml
from megatron_kd.config.errors import ConfigError
from megatron_kd.config.presets import PRESETS
from megatron_kd.config.run_config import RunConfig
from megatron_kd.config.sections.hidden_states_pair import HiddenStatesPair

_PROGRAM = "python -m megatron_kd.pretrain"
_USAGE = "--config run.toml [--section.key value ...]"
_COMMAND_LINE = "on the command line"

# Type of a field: its word in --help, and what an error message says is allowed.
_TYPE_WORDS: dict[Any, tuple[str, str]] = {
    bool: ("true,false", "true or false"),
    int: ("integer", "a whole number"),
    float: ("number", "a number"),
    str: ("text", "text"),
    Path: ("path", "a path"),
    tuple[str, ...]: ("list", "a list of text"),
    tuple[float, ...]: ("list", "a list of numbers"),
    tuple[HiddenStatesPair, ...]: (
        "list",
        "a list of tables of student_layer, teacher_layer, loss, weight",
    ),
    dict[str, str]: ("table", "a table of name = text"),
    dict[str, Any]: ("table", "a table of name = value"),
}


def load_config(argv: Sequence[str], *, prog: str = _PROGRAM) -> RunConfig:
    """The run described by program arguments `argv` (without the program's name): run file first, overrides on top.

    `--help` prints every key and exits with status 0. Raises ConfigError, one sentence per problem, for anything that cannot work: an
    argument that is no override, a run file that cannot be read, an unknown or missing key, a value of the wrong type or out of range, and
    values that do not fit each other.
    """
    source = _command_line(prog)
    if "--help" in argv or "-h" in argv:
        source(args=["--help"])
    path, texts = _split_arguments(argv)
    overrides = _with_preset(_decode_overrides(texts, source))
    values = {} if path is None else _flatten(_read_toml(path), path)
    if path is None and not overrides:
        raise ConfigError(f"no run file: start with {prog} {_USAGE} (--help lists every key)")
    config = _validate(values, overrides, path)
    dump_toml(config)  # a run that cannot be written down is refused before it starts
    return config


# --- the keys -----------------------------------------------------------------------------------------------------------------------------


def _plain(field: FieldInfo) -> Any:
    """The type of a field, without `| None`."""
    members = get_args(field.annotation)
    return (
        next(member for member in members if member is not NoneType)
        if NoneType in members
        else field.annotation
    )


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _walk(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted key and field of everything below `model`, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        if _is_section(_plain(field)):
            yield from _walk(_plain(field), f"{prefix}{name}.")


_SECTIONS = {key: field for key, field in _walk(RunConfig) if _is_section(_plain(field))}
_KEYS = {key: field for key, field in _walk(RunConfig) if key not in _SECTIONS}


def _bounds(field: FieldInfo) -> str:
    """The numeric range of a field: "> 0", "in [0, 1)", or "" where it has none."""
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


def _allowed(field: FieldInfo) -> str:
    """What a value of this field may be, in words."""
    kind = _plain(field)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    least = next(
        (
            f" (at least {limit.min_length})"
            for limit in field.metadata
            if hasattr(limit, "min_length")
        ),
        "",
    )
    return " ".join(filter(None, [_TYPE_WORDS[kind][1], _bounds(field)])) + least


def _unknown(key: str, where: str) -> str:
    """The sentence for a key that does not exist, naming the nearest one that does."""
    table = key.rpartition(".")[0]
    while table and table not in _KEYS:
        table = table.rpartition(".")[0]
    if table and get_origin(_plain(_KEYS[table])) is dict:
        return f"unknown key {key} {where}: give the whole of {table} as JSON, --{table} '{{\"name\": value}}'"
    if key in _SECTIONS:
        return f"{key} {where} is a section: override its keys, --{key}.key value"
    known = [*_KEYS, *_SECTIONS] + ["config"] * (where == _COMMAND_LINE)
    namesakes = [name for name in _KEYS if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = difflib.get_close_matches(key, namesakes, n=1, cutoff=0.0) or difflib.get_close_matches(
        key, known, n=1
    )
    return f"unknown key {key} {where}: " + (
        f"did you mean {near[0]}?" if near else "--help lists every key"
    )


# --- command line -------------------------------------------------------------------------------------------------------------------------


def _flags(model: type[BaseModel], base: type[BaseModel], **extra: Any) -> type[Any]:
    """A copy of `model` for the CLI source: its keys and texts, with the words and defaults a user would type in place of Python's.

    Nothing is validated by it: values leave the CLI source as text, and RunConfig checks them.
    """
    fields: dict[str, Any] = dict(extra)
    literal: Any = Literal
    for name, field in model.model_fields.items():
        kind = _plain(field)
        if _is_section(kind):
            fields[name] = (_flags(kind, BaseModel), ...)
            continue
        words = (
            tuple(map(str, get_args(kind)))
            if get_origin(kind) is Literal
            else tuple(_TYPE_WORDS[kind][0].split(","))
        )
        default = ... if field.is_required() else _default_text(field)
        fields[name] = (literal[words], Field(default, description=_help_text(field)))
    return create_model(model.__name__, __base__=base, __doc__=model.__doc__, **fields)


def _default_text(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    return "unset" if default is None else default if isinstance(default, str) else _show(default)


def _help_text(field: FieldInfo) -> str:
    text, bounds = field.description or "", _bounds(field)
    if bounds and bounds not in text:
        text += f" Must be {bounds}."
    forms = {
        tuple: " A JSON list; or repeat the option.",
        dict: " A JSON object, '{\"name\": ...}'.",
    }
    return text + forms.get(get_origin(_plain(field)), "")


@cache
def _command_line(prog: str) -> CliSettingsSource[Any]:
    literal: Any = Literal
    config = (
        literal["path"],
        Field(
            "unset",
            description="Run file (TOML) with sections and keys as below. Overrides win over it.",
        ),
    )
    source: CliSettingsSource[Any] = CliSettingsSource(
        _flags(RunConfig, BaseSettings, config=config),
        cli_prog_name=prog,
        cli_avoid_json=True,
        cli_parse_none_str="null",
        cli_use_class_docs_for_groups=True,
        cli_exit_on_error=False,
        formatter_class=HelpFormatter,
    )
    source.root_parser.usage = f"%(prog)s {_USAGE}"
    source.root_parser.description = RunConfig.__doc__
    source.root_parser.epilog = "Overrides are --section.key value or --section.key=value. null unsets a key whose default is unset."
    return source


def _split_arguments(argv: Sequence[str]) -> tuple[str | None, dict[str, list[str]]]:
    """The run file's path, and the texts given for each key. ConfigError for a stray argument, a missing value or an unknown key."""
    texts: dict[str, list[str]] = {}
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
        if key != "config" and key not in _KEYS:
            problems.append(_unknown(key, _COMMAND_LINE))
        elif not text:
            problems.append(f"{key} {_COMMAND_LINE} needs a value: --{key}=value")
        else:
            texts.setdefault(key, []).append(text)
    paths = texts.pop("config", [])
    if len(paths) > 1:
        problems.append(f"--config is given {len(paths)} times: one run has one run file")
    _raise(problems)
    return (paths[0] if paths else None), texts


def _decode_overrides(
    texts: Mapping[str, list[str]], source: CliSettingsSource[Any]
) -> dict[str, Any]:
    """Flat {dotted key: value}; numbers and booleans still text, lists and tables decoded, None for null. ConfigError for broken JSON."""
    arguments, problems = [], []
    for key, given in texts.items():
        field, text = _KEYS[key], given[-1]
        nullable = NoneType in get_args(field.annotation)
        if given == ["null"] or (nullable and text.lower() in ("null", "none")):
            text = "null"
        elif get_origin(_plain(field)) is tuple:
            if len(given) > 1 and any(text.startswith("[") for text in given):
                problems.append(
                    f"{key} is given {len(given)} times {_COMMAND_LINE}: give one JSON list, or repeat it with one entry each"
                )
            objects = _is_section(get_args(_plain(field))[0])
            text = (
                text
                if text.startswith("[")
                else f"[{', '.join(given)}]"
                if objects
                else json.dumps(given)
            )
        arguments.append(f"--{key}={text}")
    parsed = source(args=arguments)()
    overrides: dict[str, Any] = {}
    for key in texts:
        value: Any = parsed
        for name in key.split("."):
            value = value[name]
        if value is not None and get_origin(_plain(_KEYS[key])) in (tuple, dict):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                problems.append(
                    f"{key} must be {_allowed(_KEYS[key])} as JSON, got {value} {_COMMAND_LINE}: {error.msg}"
                )
        overrides[key] = value
    _raise(problems)
    return overrides


def _with_preset(overrides: dict[str, Any]) -> dict[str, Any]:
    """A preset on the command line wins over the run file's keys, like every override; other overrides win over it."""
    preset = overrides.get("model.preset")
    filled = (
        {f"model.{name}": value for name, value in PRESETS.get(preset, {}).items()}
        if preset is not None
        else {}
    )
    return {**filled, **overrides}


# --- run file -----------------------------------------------------------------------------------------------------------------------------


def _read_toml(path: str) -> dict[str, Any]:
    """The run file as nested tables. ConfigError, with line and column, where it cannot be read."""
    try:
        text = Path(path).read_bytes().decode()
        return tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"run file {path} does not exist") from None
    except OSError as error:
        raise ConfigError(f"cannot read run file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not valid TOML: it is not UTF-8 (at {_place(error.object[: error.start].decode())})"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{path} is not valid TOML: {str(error).replace('end of document', _place(text))}"
        ) from None


def _place(before: str) -> str:
    """Where a text stops, in tomllib's words."""
    return f"line {before.count(chr(10)) + 1}, column {len(before) - before.rfind(chr(10))}"


def _flatten(tree: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Flat {dotted key: value} of a run file. ConfigError for an unknown key, and for a section that is not a table."""
    flat: dict[str, Any] = {}
    problems: list[str] = []

    def visit(table: Mapping[str, Any], prefix: str) -> None:
        for name, value in table.items():
            key = prefix + (
                f'"{name}"' if "." in name else name
            )  # a quoted key with a dot is one name, not two
            if key in _KEYS:
                flat[key] = value
            elif key in _SECTIONS and isinstance(value, dict):
                visit(value, f"{key}.")
            elif key in _SECTIONS:
                problems.append(
                    f"{key} in {path} must be a section, [{key}] with its keys below, got {_show(value)}"
                )
            else:
                problems.append(_unknown(key, f"in {path}"))

    visit(tree, "")
    _raise(problems)
    return flat


# --- checks -------------------------------------------------------------------------------------------------------------------------------


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError("\n".join(problems))


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables from dotted keys. Required sections are always there, so that what is missing is a key, not a whole section."""
    tree: dict[str, Any] = {
        key: {} for key, field in _SECTIONS.items() if field.is_required() and "." not in key
    }
    for key, value in flat.items():
        table = tree
        *parents, name = key.split(".")
        for parent in parents:
            table = table.setdefault(parent, {})
        table[name] = value
    return tree


def _validate(
    values: Mapping[str, Any], overrides: Mapping[str, Any], path: str | None
) -> RunConfig:
    """RunConfig from the file's `values` with `overrides` on top; ConfigError with every problem found.

    The file's own values are checked strictly first (in TOML "64" is no number, though the text 64 on a command line is one), including
    those that an override replaces.
    """
    problems: dict[str, str] = {}
    strict = json.dumps(_nest(values), default=str)
    for error in _errors(lambda: RunConfig.model_validate_json(strict, strict=True)):
        if error["type"] not in ("missing", "value_error"):
            key = _key(error)
            problems[key] = _wrong(key, _show(values[key]), f"in {path}") + _inside(error)
    for key, value in values.items():
        if (
            value == "" and _plain(_KEYS[key]) is Path
        ):  # pathlib would read it as the working directory
            problems[key] = _wrong(key, _show(value), f"in {path}")
    tree = _nest({**values, **overrides})
    for error in _errors(lambda: RunConfig.model_validate(tree)):
        key = _key(error)
        if error["type"] == "value_error":
            # A check's message starts with the name of the field it is about; the section in front makes that a dotted key.
            for sentence in str(error["ctx"]["error"]).splitlines():
                problems[sentence] = f"{key}.{sentence}" if key else sentence
        elif error["type"] == "missing" and not _inside(error):
            place = (
                f"in {path} or with --{key}"
                if path
                else f"with --{key}, or give a run file with --config"
            )
            problems[key] = f"{key} is missing: set it to {_allowed(_KEYS[key])} {place}"
        elif key in overrides:
            text = overrides[key]
            problems.setdefault(
                key,
                _wrong(key, text if isinstance(text, str) else _show(text), _COMMAND_LINE)
                + _inside(error),
            )
        else:
            problems.setdefault(key, _wrong(key, _show(values[key]), f"in {path}") + _inside(error))
    _raise(list(problems.values()))
    return RunConfig.model_validate(tree)


def _errors(validate: Callable[[], RunConfig]) -> list[ErrorDetails]:
    try:
        validate()
    except ValidationError as error:
        return error.errors()
    return []


def _key(error: ErrorDetails) -> str:
    """Dotted key of a pydantic error, without the position inside a list or table."""
    path: list[str] = []
    for part in error["loc"]:
        if ".".join(path) in _KEYS:
            break
        path.append(str(part))
    return ".".join(path)


def _inside(error: ErrorDetails) -> str:
    """What is wrong with one entry of a list of tables, in words; "" for any other error."""
    key = _key(error)
    place = error["loc"][len(key.split(".")) :]
    if key not in _KEYS or len(place) < 2 or not isinstance(place[0], int):
        return ""
    return f" (entry {place[0] + 1}, {'.'.join(map(str, place[1:]))}: {error['msg'][:1].lower()}{error['msg'][1:]})"


def _wrong(key: str, given: str, where: str) -> str:
    return f"{key} must be {_allowed(_KEYS[key])}, got {given} {where}"
