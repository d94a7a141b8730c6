"""Merge token files into one, in a given order."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kd.config import ConfigError
from megatron_kd.data.preparation.publish import publish
from megatron_kd.data.token_file_checks import check_token_file
from megatron_kd.data.token_files import read_index, read_roles

_EQUAL_KEYS = (
    "tokenizer_digest",
    "vocab_size",
    "end_of_document",
    "append_eod",
    "dtype",
    "packed_length",
)
_SUMMED_KEYS = ("bytes", "tokens", "documents", "conversations", "loss_tokens")


def merge(prefixes: Sequence[str], output: Path) -> dict[str, Any]:
    """Merge token files and return the description of the result.

    Raises:
        ConfigError: a part is damaged, the parts differ, or the output exists.
    """
    for ending in (".bin", ".idx", ".json"):
        if Path(f"{output}{ending}").exists():
            raise ConfigError(f"{output}{ending} is there already: choose another --output")
    description = _merged_description(prefixes)
    output.parent.mkdir(parents=True, exist_ok=True)
    lengths = [
        output.with_name(f".{output.name}.lengths{number}.partial-{os.getpid()}")
        for number in range(len(prefixes))
    ]
    try:
        for prefix, path in zip(prefixes, lengths, strict=True):
            check_token_file(
                prefix,
                vocab_size=description["vocab_size"],
                tokenizer_digest=description["tokenizer_digest"],
            )
            _document_lengths(prefix).tofile(path)
        ids = [Path(f"{prefix}.bin") for prefix in prefixes]
        roles = _role_files(prefixes)
        publish(output, np.dtype(description["dtype"]), ids, lengths, description, roles)
    finally:
        for path in lengths:
            path.unlink(missing_ok=True)
    return description


def _merged_description(prefixes: Sequence[str]) -> dict[str, Any]:
    """Return the .json of the result: sums, the largest id, and what all parts share."""
    parts = [_read_description(prefix) for prefix in prefixes]
    description: dict[str, Any] = {}
    for key in _EQUAL_KEYS:
        values = {json.dumps(part.get(key)) for part in parts}
        if len(values) > 1:
            raise ConfigError(
                f"{' and '.join(prefixes)} differ in {key} ({', '.join(sorted(values))}): "
                "they cannot be one file"
            )
        description[key] = parts[0].get(key)
    description |= {key: sum(part.get(key, 0) for part in parts) for key in _SUMMED_KEYS}
    # Text and conversations have different keys.
    description = {key: value for key, value in description.items() if key in parts[0]}
    return description | {
        "max_id": max(part["max_id"] for part in parts),
        "merged_from": [str(Path(prefix).absolute()) for prefix in prefixes],
    }


def _read_description(prefix: str) -> dict[str, Any]:
    try:
        description: dict[str, Any] = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{prefix}.json cannot be read, so its tokenizer is not known ({error}): "
            f"make {prefix} again"
        ) from error
    return description


def _document_lengths(prefix: str) -> np.ndarray:
    """Return int32 [documents], tokens of each document; 0 for an empty one.

    A document mark that repeats the one before stands for an empty document.
    """
    index = read_index(prefix)
    num_sequences = np.diff(index.documents)
    if (num_sequences > 1).any():
        raise ConfigError(
            f"{prefix} has documents of several sequences, which this tool does not join"
        )
    lengths = np.zeros(len(num_sequences), "<i4")
    lengths[num_sequences == 1] = index.lengths
    return lengths


def _role_files(prefixes: Sequence[str]) -> list[Path]:
    roles = [Path(f"{prefix}.roles") for prefix in prefixes if read_roles(prefix) is not None]
    if len(roles) not in (0, len(prefixes)):
        raise ConfigError(
            f"some of {' and '.join(prefixes)} have a .roles file and others do not: "
            "they cannot be one file"
        )
    return roles
