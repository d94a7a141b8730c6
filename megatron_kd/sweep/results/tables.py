"""Format the results of sweeps as tables and as JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_kd.sweep.results.sweep_results import CellResult, SeedValues, SweepResult

_SWEEP_KEYS = (
    "title",
    "baseline",
    "seeds",
    "small",
    "commit",
    "machine",
    "versions",
    "command",
    "time",
)


def decimals(samples: Sequence[SeedValues]) -> int:
    """Return the decimals of a column: two digits of the median spread, or four digits in all."""
    spreads = [sample.sd for sample in samples if sample.sd]
    if spreads:
        return min(6, max(0, 1 - math.floor(math.log10(statistics.median(spreads)))))
    means = [abs(sample.mean) for sample in samples if sample.mean]
    return min(6, max(0, 3 - math.floor(math.log10(statistics.median(means))))) if means else 4


def format_sample(sample: SeedValues | None, digits: int, *, sign: str = "") -> str:
    """Format as mean ± standard deviation, with "(2 of 3)" if seeds are missing.

    Args:
        sample: Values by seed.
        digits: Number of decimals.
        sign: "+" to write the sign of a positive mean.
    """
    if sample is None or sample.mean is None:
        return "-"
    spread = "" if sample.sd is None else f" ± {sample.sd:.{digits}f}"
    missing = f" ({sample.n} of {sample.n + len(sample.lacking)})" if sample.lacking else ""
    return f"{sample.mean:{sign},.{digits}f}{spread}{missing}"


def heading(metric: Mapping[str, Any]) -> str:
    """Return the heading of a metric's column: name (unit)."""
    return f"{metric['name']} ({metric['unit']})" if metric["unit"] else str(metric["name"])


def is_measured(metric: Mapping[str, Any]) -> bool:
    """Return True if any cell has the metric; with groups = [] only the source has it."""
    return metric.get("groups") != []


def paper_heading(metric: Mapping[str, Any]) -> str:
    """Return the heading of the source's figures, with the unit if no other column has it."""
    return f"{metric['name'] if is_measured(metric) else heading(metric)}, paper"


def baseline_name(result: SweepResult) -> str:
    """Return the name of the baseline for a heading."""
    names: str | list[str] = result.content["baseline"]
    return names if isinstance(names, str) else "its group's baseline"


def finished_seeds(result: SweepResult, cell: CellResult) -> str:
    """Return the number of finished seeds, with "of N" if some are missing."""
    finished = result.seeds - len(cell.lacking)
    return f"{finished} of {result.seeds}" if cell.lacking else str(finished)


def table(result: SweepResult) -> list[list[str]]:
    """Return the header and a line for each cell.

    The columns are cell, group and seeds, and for each metric mean ± standard deviation, the
    difference to the baseline, and the source's figure.
    """
    header = ["cell", "group", "seeds"]
    columns = [
        [cell.name for cell in result.cells],
        [cell.group for cell in result.cells],
        [finished_seeds(result, cell) for cell in result.cells],
    ]
    for metric in result.metrics:
        name = metric["name"]
        digits = decimals([cell.samples[name] for cell in result.cells])
        if is_measured(metric):
            header.append(heading(metric))
            columns.append([format_sample(cell.samples[name], digits) for cell in result.cells])
        if result.has_baseline and is_measured(metric):
            header.append(f"{name} - {baseline_name(result)}")
            columns.append(
                [format_sample(cell.differences[name], digits, sign="+") for cell in result.cells]
            )
        if any(name in cell.paper for cell in result.cells):
            header.append(paper_heading(metric))
            columns.append(
                [f"{cell.paper[name]:g}" if name in cell.paper else "-" for cell in result.cells]
            )
    return [header, *map(list, zip(*columns, strict=True))]


def as_json(result: SweepResult) -> dict[str, Any]:
    """Return the content of the table with the value of each seed."""
    cells = [
        {
            "name": cell.name,
            "group": cell.group,
            "values": cell.values,
            "metrics": {
                name: {
                    **(_sample_as_json(sample) or {}),
                    "difference": _sample_as_json(cell.differences[name]),
                    "paper": cell.paper.get(name),
                }
                for name, sample in cell.samples.items()
            },
        }
        for cell in result.cells
    ]
    description = {key: result.content[key] for key in _SWEEP_KEYS}
    return {**description, "cells": cells, "notes": result.notes()}


def _sample_as_json(sample: SeedValues | None) -> dict[str, Any] | None:
    if sample is None:
        return None
    return {
        "mean": sample.mean,
        "sd": sample.sd,
        "n": sample.n,
        "values": {str(seed): value for seed, value in sample.values.items()},
        "lacking": {str(seed): reason for seed, reason in sample.lacking.items()},
    }


def align(lines: Sequence[Sequence[str]], *, markdown: bool) -> str:
    """Format a table, its header first, with all columns but the first right-aligned.

    Args:
        lines: Cells of the header and of each line.
        markdown: Format as Markdown, not as plain text.
    """
    if markdown:
        lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in padded)
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [padded[0], rule, *padded[1:]])
