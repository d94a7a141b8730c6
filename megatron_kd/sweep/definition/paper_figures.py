"""Look up the figures of a source for the cells of a grid."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from megatron_kd.config import ConfigError
from megatron_kd.sweep.definition.sweep_file import CellSection
from megatron_kd.sweep.definition.templating import as_text


def paper_figures(
    section: CellSection, name: str, values: Sequence[Any], location: str
) -> dict[str, float]:
    """Return the source's figure of one cell for each metric that has one.

    A metric has one figure for all values, or figures by the name of the cell or by its values,
    joined by ", ".

    Args:
        section: The [[cell]] with its `paper`.
        name: Name of the cell, expanded.
        values: Values of the cell, in the order of `vary`.
        location: Place in the sweep file, for the error message.

    Returns:
        Figures by metric.

    Raises:
        ConfigError: A key names no combination of values.
    """
    combinations = _combinations(section)
    figures: dict[str, float] = {}
    for metric, figure in section.paper.items():
        if not isinstance(figure, dict):
            figures[metric] = figure
            continue
        for key, value in figure.items():
            if key == name or _matches(key, values):
                figures[metric] = value
            elif not _names_sibling(key, section) and not any(
                _matches(key, combination) for combination in combinations
            ):
                raise ConfigError(
                    f"{location}: paper: {metric}: {key!r} is none of the values that vary"
                )
    return figures


def _combinations(section: CellSection) -> list[tuple[Any, ...]]:
    vary = section.vary or []
    if isinstance(vary, dict):
        return list(itertools.product(*vary.values()))
    return [tuple(values.values()) for values in vary]


def _matches(key: str, values: Sequence[Any]) -> bool:
    texts = [text.strip() for text in key.split(",")]
    return len(texts) == len(values) and all(map(_is_same, texts, values))


def _names_sibling(key: str, section: CellSection) -> bool:
    """Return True if a key may be the name of another cell of the section, by its beginning."""
    head = section.name.partition("{")[0]
    return bool(head) and key.startswith(head)


def _is_same(text: str, value: Any) -> bool:
    if text == as_text(value):
        return True
    try:
        return not isinstance(value, bool | str) and float(text) == float(value)
    except (TypeError, ValueError):
        return False
