"""What a sweep found, from its folder alone: a value for each metric, cell and seed, their mean and spread, and what is missing.

A seed counts when its run is finished, with the definition that sweep.json has, and everything that was to be measured on it is: what is
half-done has numbers too, of a shorter run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_kd.config import ConfigError
from megatron_kd.storage.json_files import read_json
from megatron_kd.sweep.sweep_record import FORMAT, SWEEP_FILE
from megatron_kd.sweep.task_state import NOTES


@dataclass(frozen=True)
class Sample:
    """One number per seed, and why the other seeds have none."""

    values: dict[int, float]
    lacking: dict[int, str]

    @property
    def n(self) -> int:
        """Seeds that have a value."""
        return len(self.values)

    @property
    def mean(self) -> float | None:
        """None without a value."""
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def sd(self) -> float | None:
        """Standard deviation over seeds, n - 1 in the denominator; None with fewer than two."""
        return statistics.stdev(self.values.values()) if self.n > 1 else None


@dataclass(frozen=True)
class Row:
    """A cell: for each metric its sample, the differences to the baseline with the same seed (None without one), and the paper's figure."""

    name: str
    group: str
    values: dict[str, Any]
    folders: dict[int, Path]
    lacking: dict[int, str]
    samples: dict[str, Sample]
    differences: dict[str, Sample | None]
    paper: dict[str, float]


@dataclass(frozen=True)
class Result:
    """A sweep's folder. origins: "commit, machine" -> how many finished steps are from there."""

    out: Path
    content: dict[str, Any]
    rows: tuple[Row, ...]
    origins: dict[str, int]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """As in the sweep file."""
        found: list[dict[str, Any]] = self.content["metrics"]
        return found

    @property
    def seeds(self) -> int:
        """How many every cell should have."""
        return len(self.content["seeds"])

    def group(self, names: Sequence[str] | None) -> list[Row]:
        """The rows of these groups; of all without names."""
        return [row for row in self.rows if names is None or row.group in names]

    def notes(self) -> list[str]:
        """A sentence for every cell that lacks seeds or numbers."""
        found = []
        for row in self.rows:
            reasons = dict(row.lacking)
            for name, sample in row.samples.items():
                reasons |= {
                    seed: f"{name}: {why}"
                    for seed, why in sample.lacking.items()
                    if seed not in row.lacking
                }
            if reasons:
                told = "; ".join(f"seed {seed}: {why}" for seed, why in sorted(reasons.items()))
                found.append(
                    f"{row.name}: {self.seeds - len(reasons)} of {self.seeds} seeds are complete ({told})"
                )
        if self.content["left_out"]:
            found.append(f"left out with --small: {', '.join(self.content['left_out'])}")
        return found


def read_result(out: Path) -> Result:
    """ConfigError where the folder has no sweep.json that can be read. Missing runs are no error: they are told."""
    content = read_json(out / SWEEP_FILE, what="sweep")
    if content.get("format") != FORMAT:
        raise ConfigError(
            f"{out / SWEEP_FILE} is of format {content.get('format')!r}, and this program reads {FORMAT}"
        )
    origins: Counter[str] = Counter()
    try:
        rows = [_row(out, cell, content["metrics"], origins) for cell in content["cells"]]
        rows = [_compared(row, _baseline(row, rows, content["baseline"])) for row in rows]
        return Result(out, content, tuple(rows), dict(origins.most_common()))
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{out / SWEEP_FILE} is damaged ({error!r}): start the sweep again, which writes it"
        ) from None


def _row(
    out: Path, cell: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], origins: Counter[str]
) -> Row:
    lacking: dict[int, str] = {}
    folders: dict[int, Path] = {}
    for text, run in cell["runs"].items():
        folder = out / run["folder"]
        why = _unfinished(folder, run["steps"], origins)
        if why:
            lacking[int(text)] = why
        else:
            folders[int(text)] = folder
    samples = {}
    for metric in metrics:
        if metric.get("groups") is not None and cell["group"] not in metric["groups"]:
            samples[metric["name"]] = Sample({}, {})
            continue
        found = {seed: _value(folder, metric) for seed, folder in folders.items()}
        values = {seed: value for seed, value in found.items() if not isinstance(value, str)}
        samples[metric["name"]] = Sample(
            values,
            lacking | {seed: value for seed, value in found.items() if isinstance(value, str)},
        )
    return Row(
        cell["name"], cell["group"], cell["values"], folders, lacking, samples, {}, cell["paper"]
    )


def _baseline(row: Row, rows: Sequence[Row], names: str | list[str] | None) -> Row | None:
    """What a row is compared with: the one cell for all of them, or of several the one of its own group."""
    if isinstance(names, str):
        return next((each for each in rows if each.name == names), None)
    return next(
        (each for each in rows if each.name in (names or []) and each.group == row.group), None
    )


def baseline_name(result: Result) -> str:
    """For a heading."""
    names: str | list[str] = result.content["baseline"]
    return names if isinstance(names, str) else "its group's baseline"


def _compared(row: Row, baseline: Row | None) -> Row:
    differences: dict[str, Sample | None] = dict.fromkeys(row.samples)
    if baseline is None or baseline.name == row.name:
        return dataclasses.replace(row, differences=differences)
    for name, sample in row.samples.items():
        there = baseline.samples[name]
        both = {
            seed: value - there.values[seed]
            for seed, value in sample.values.items()
            if seed in there.values
        }
        differences[name] = Sample(
            both,
            {seed: "no pair" for seed in [*sample.values, *sample.lacking] if seed not in both},
        )
    return dataclasses.replace(row, differences=differences)


def _unfinished(folder: Path, steps: Mapping[str, str], origins: Counter[str]) -> str:
    """Why a run does not count; "" where it does."""
    if not folder.exists():
        return "not started"
    for name, digest in steps.items():
        try:
            record = json.loads((folder / NOTES / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return "not finished" if name == "run" else f"{name} not done"
        if record.get("digest") != digest:
            return f"{name} is of another definition"
        origins[f"{record.get('commit')}, {record.get('machine')}"] += 1
    if "run" not in steps:
        return ""
    try:
        state = json.loads((folder / "status.json").read_text(encoding="utf-8")).get("state")
    except (OSError, ValueError):
        state = None
    return "" if state == "finished" else "not finished"


def _value(folder: Path, metric: Mapping[str, Any]) -> float | str:
    """A finite number, or why there is none."""
    path = folder / metric["file"]
    try:
        if path.suffix == ".jsonl":
            rows = read_rows(path, metric["split"])
            content: Any = rows[-1] if rows else None
            if content is None:
                return f"{metric['file']} has no row of {metric['split'] or 'training'}"
        else:
            content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"no {metric['file']}"
    except (OSError, ValueError):
        return f"{metric['file']} cannot be read"
    try:
        value = dig(content, metric["key"])
    except (KeyError, IndexError, ValueError, TypeError):
        return f"{metric['file']} has no {metric['key']}"
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        return f"{metric['key']} is no number"
    return "not finite" if value is None or not math.isfinite(value) else float(value)


def dig(content: Any, path: str) -> Any:
    """The value at a dotted path; numbers count in lists. KeyError, IndexError, ValueError or TypeError where there is none."""
    for name in path.split("."):
        content = content[int(name)] if isinstance(content, list) else content[name]
    return content


def read_rows(path: Path, split: str | None) -> list[dict[str, Any]]:
    """Rows of a metrics file: of a validation split, or of training without one. OSError, ValueError."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if isinstance(row, dict) and row.get("split") == split]


# --- as text ------------------------------------------------------------------------------------------------------------------------------


def decimals(samples: Sequence[Sample]) -> int:
    """Digits after the point for a column: two of the usual spread, or four in all where there is none."""
    spreads = [sample.sd for sample in samples if sample.sd]
    if spreads:
        return min(6, max(0, 1 - math.floor(math.log10(statistics.median(spreads)))))
    means = [abs(sample.mean) for sample in samples if sample.mean]
    return min(6, max(0, 3 - math.floor(math.log10(statistics.median(means))))) if means else 4


def shown(sample: Sample | None, digits: int, *, sign: str = "") -> str:
    """mean ± sd, and "(2 of 3)" where seeds are missing."""
    if sample is None or sample.mean is None:
        return "-"
    spread = "" if sample.sd is None else f" ± {sample.sd:.{digits}f}"
    missing = f" ({sample.n} of {sample.n + len(sample.lacking)})" if sample.lacking else ""
    return f"{sample.mean:{sign},.{digits}f}{spread}{missing}"


def heading(metric: Mapping[str, Any]) -> str:
    """name (unit)."""
    return f"{metric['name']} ({metric['unit']})" if metric["unit"] else str(metric["name"])


def measured(metric: Mapping[str, Any]) -> bool:
    """Whether any cell has it; with groups = [] it is the source's alone."""
    return metric.get("groups") != []


def paper_heading(metric: Mapping[str, Any]) -> str:
    """Of the source's figures; with the unit where no column of ours has told it."""
    return f"{metric['name'] if measured(metric) else heading(metric)}, paper"


def table(result: Result) -> list[list[str]]:
    """Header and rows: cell, group, seeds, and for each metric mean ± standard deviation, the difference to the baseline, the paper's."""
    header, columns = ["cell", "group", "seeds"], []
    baseline = any(each is not None for row in result.rows for each in row.differences.values())
    for metric in result.metrics:
        name = metric["name"]
        digits = decimals([row.samples[name] for row in result.rows])
        if measured(metric):
            header.append(heading(metric))
            columns.append([shown(row.samples[name], digits) for row in result.rows])
        if baseline and measured(metric):
            header.append(f"{name} - {baseline_name(result)}")
            columns.append([shown(row.differences[name], digits, sign="+") for row in result.rows])
        if any(name in row.paper for row in result.rows):
            header.append(paper_heading(metric))
            columns.append(
                [f"{row.paper[name]:g}" if name in row.paper else "-" for row in result.rows]
            )
    body = []
    for number, row in enumerate(result.rows):
        done = result.seeds - len(row.lacking)
        body.append(
            [
                row.name,
                row.group,
                str(done) if not row.lacking else f"{done} of {result.seeds}",
                *(column[number] for column in columns),
            ]
        )
    return [header, *body]


def as_json(result: Result) -> dict[str, Any]:
    """Everything in the table, with the value of each seed."""

    def sample(found: Sample | None) -> dict[str, Any] | None:
        if found is None:
            return None
        values = {str(seed): value for seed, value in found.values.items()}
        return {
            "mean": found.mean,
            "sd": found.sd,
            "n": found.n,
            "values": values,
            "lacking": {str(k): why for k, why in found.lacking.items()},
        }

    cells = [
        {
            "name": row.name,
            "group": row.group,
            "values": row.values,
            "metrics": {
                name: {
                    **(sample(found) or {}),
                    "difference": sample(row.differences[name]),
                    "paper": row.paper.get(name),
                }
                for name, found in row.samples.items()
            },
        }
        for row in result.rows
    ]
    kept = {
        key: result.content[key]
        for key in (
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
    }
    return {**kept, "cells": cells, "notes": result.notes()}
