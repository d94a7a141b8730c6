"""Render the reference page of the run file from the declarations of its sections."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_kd.config.arguments import default_text
from megatron_kd.config.keys import KEYS, SECTIONS, allowed_values, is_section, value_type

_INTRODUCTION = """\
# Run-file reference

A run file is a TOML file of sections. Every key can also be set on the command line, where
`--section.key value` wins over the file. `null` on the command line unsets a key whose default is
unset. This page is generated from `megatron_kd/config/sections/`; `--help` prints the same text.
"""
_HEADER = "| Key | Value | Default | Description |\n|---|---|---|---|"


def run_file_reference() -> str:
    """Return the reference of all sections and keys as Markdown, one table per section."""
    blocks = [_INTRODUCTION]
    for name, field in SECTIONS.items():
        blocks.append(_section(f"[{name}]", value_type(field), name))
        for key, model in _entry_models(name):
            blocks.append(_section(f"Entries of {key}", model, None))
    return "\n".join(blocks)


def _section(title: str, model: type[BaseModel], prefix: str | None) -> str:
    """Return heading, text and table of one section.

    Args:
        title: text of the heading.
        model: the section.
        prefix: dotted key of the section; None for an entry of a list of tables.
    """
    rows = [
        _row(name if prefix is None else f"{prefix}.{name}", field)
        for name, field in model.model_fields.items()
        if not is_section(value_type(field))
    ]
    return f"## {title}\n\n{inspect.getdoc(model)}\n\n" + "\n".join([_HEADER, *rows]) + "\n"


def _entry_models(section: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield dotted key and entry model of every list of tables in a section."""
    for key, field in KEYS.items():
        kind = value_type(field)
        if key.rpartition(".")[0] == section and get_origin(kind) is tuple:
            model = get_args(kind)[0]
            if is_section(model):
                yield key, model


def _row(key: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else default_text(field)
    code = default if default in ("required", "unset") else f"`{default}`"
    description = " ".join((field.description or "").split())
    cells = [f"`{key}`", allowed_values(field), code, description]
    return "| " + " | ".join(_escape(cell) for cell in cells) + " |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
