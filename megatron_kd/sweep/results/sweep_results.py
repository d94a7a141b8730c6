"""Read the results of a sweep: values by metric, cell and seed, and what is missing.

A seed counts if its run is finished with the definition in sweep.json and everything that was to be
measured on it is measured. Unfinished runs have numbers too, but of a shorter training.
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
from megatron_kd.sweep.file_names import FORMAT, RECORDS_FOLDER, SWEEP_FILE


@dataclass(frozen=True)
class SeedValues:
    """Hold one number per seed.

    Attributes:
        values: Numbers by seed.
        lacking: Why the other seeds have none, by seed.
    """

    values: dict[int, float]
    lacking: dict[int, str]

    @property
    def n(self) -> int:
        """Return the number of seeds with a value."""
        return len(self.values)

    @property
    def mean(self) -> float | None:
        """Return the mean over seeds, None without a value."""
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def sd(self) -> float | None:
        """Return the standard deviation over seeds (n - 1), None with fewer than two values."""
        return statistics.stdev(self.values.values()) if self.n > 1 else None


@dataclass(frozen=True)
class CellResult:
    """Hold the results of one cell.

    Attributes:
        values: The values that vary, by name.
        folders: Folders of the finished runs, by seed.
        lacking: Why other runs do not count, by seed.
        samples: Values by metric.
        differences: Differences to the baseline with the same seed, by metric. None without a
            baseline.
        paper: The source's figures by metric.
    """

    name: str
    group: str
    values: dict[str, Any]
    folders: dict[int, Path]
    lacking: dict[int, str]
    samples: dict[str, SeedValues]
    differences: dict[str, SeedValues | None]
    paper: dict[str, float]


@dataclass(frozen=True)
class SweepResult:
    """Hold the results of a sweep.

    Attributes:
        content: Content of sweep.json.
        origins: Number of finished steps by "commit, machine".
    """

    out: Path
    content: dict[str, Any]
    cells: tuple[CellResult, ...]
    origins: dict[str, int]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Return the metrics as in the sweep file."""
        metrics: list[dict[str, Any]] = self.content["metrics"]
        return metrics

    @property
    def seeds(self) -> int:
        """Return how many seeds every cell should have."""
        return len(self.content["seeds"])

    @property
    def has_baseline(self) -> bool:
        """Return True if any cell is compared with a baseline."""
        return any(
            difference is not None
            for cell in self.cells
            for difference in cell.differences.values()
        )

    def groups(self, names: Sequence[str] | None) -> list[CellResult]:
        """Return the cells of these groups, or all cells."""
        return [cell for cell in self.cells if names is None or cell.group in names]

    def notes(self) -> list[str]:
        """Return a sentence for every cell that lacks seeds or numbers."""
        notes = []
        for cell in self.cells:
            reasons = dict(cell.lacking)
            for name, sample in cell.samples.items():
                reasons |= {
                    seed: f"{name}: {reason}"
                    for seed, reason in sample.lacking.items()
                    if seed not in cell.lacking
                }
            if reasons:
                text = "; ".join(
                    f"seed {seed}: {reason}" for seed, reason in sorted(reasons.items())
                )
                complete = f"{self.seeds - len(reasons)} of {self.seeds} seeds are complete"
                notes.append(f"{cell.name}: {complete} ({text})")
        if self.content["left_out"]:
            notes.append(f"left out with --small: {', '.join(self.content['left_out'])}")
        return notes


def read_result(out: Path) -> SweepResult:
    """Read the results of a sweep. Missing runs are no error: `SweepResult.notes` names them.

    Args:
        out: Folder of the sweep.

    Returns:
        The results.

    Raises:
        ConfigError: The folder has no readable sweep.json.
    """
    path = out / SWEEP_FILE
    content = read_json(path, setting="sweep")
    if content.get("format") != FORMAT:
        raise ConfigError(
            f"{path} is of format {content.get('format')!r}, and this program reads {FORMAT}"
        )
    origins: Counter[str] = Counter()
    try:
        cells = [_read_cell(out, cell, content["metrics"], origins) for cell in content["cells"]]
        cells = [
            _with_differences(cell, _baseline(cell, cells, content["baseline"])) for cell in cells
        ]
        return SweepResult(out, content, tuple(cells), dict(origins.most_common()))
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is damaged ({error!r}): start the sweep again, which writes it"
        ) from None


def _read_cell(
    out: Path, cell: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], origins: Counter[str]
) -> CellResult:
    lacking: dict[int, str] = {}
    folders: dict[int, Path] = {}
    for seed, run in cell["runs"].items():
        folder = out / run["folder"]
        reason = _unfinished(folder, run["steps"], origins)
        if reason:
            lacking[int(seed)] = reason
        else:
            folders[int(seed)] = folder
    samples = {
        metric["name"]: _read_metric(metric, cell["group"], folders, lacking) for metric in metrics
    }
    return CellResult(
        cell["name"], cell["group"], cell["values"], folders, lacking, samples, {}, cell["paper"]
    )


def _read_metric(
    metric: Mapping[str, Any], group: str, folders: Mapping[int, Path], lacking: Mapping[int, str]
) -> SeedValues:
    if metric.get("groups") is not None and group not in metric["groups"]:
        return SeedValues({}, {})
    values: dict[int, float] = {}
    reasons = dict(lacking)
    for seed, folder in folders.items():
        value = _read_value(folder, metric)
        if isinstance(value, str):
            reasons[seed] = value
        else:
            values[seed] = value
    return SeedValues(values, reasons)


def _baseline(
    cell: CellResult, cells: Sequence[CellResult], names: str | list[str] | None
) -> CellResult | None:
    """Return the one baseline of all cells, or of several the one in the cell's own group."""
    if isinstance(names, str):
        return next((other for other in cells if other.name == names), None)
    members = (other for other in cells if other.group == cell.group)
    return next((other for other in members if other.name in (names or [])), None)


def _with_differences(cell: CellResult, baseline: CellResult | None) -> CellResult:
    differences: dict[str, SeedValues | None] = dict.fromkeys(cell.samples)
    if baseline is None or baseline.name == cell.name:
        return dataclasses.replace(cell, differences=differences)
    for name, sample in cell.samples.items():
        reference = baseline.samples[name].values
        paired = {
            seed: value - reference[seed]
            for seed, value in sample.values.items()
            if seed in reference
        }
        unpaired = [seed for seed in [*sample.values, *sample.lacking] if seed not in paired]
        differences[name] = SeedValues(paired, dict.fromkeys(unpaired, "no pair"))
    return dataclasses.replace(cell, differences=differences)


def _unfinished(folder: Path, steps: Mapping[str, str], origins: Counter[str]) -> str:
    """Return why a run does not count, "" if it does. Counts the origins of its steps."""
    if not folder.exists():
        return "not started"
    for name, digest in steps.items():
        path = folder / RECORDS_FOLDER / f"{name}.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
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


def _read_value(folder: Path, metric: Mapping[str, Any]) -> float | str:
    """Return a finite number, or the reason why there is none."""
    path = folder / metric["file"]
    try:
        if path.suffix == ".jsonl":
            lines = read_metrics(path, metric["split"])
            if not lines:
                return f"{metric['file']} has no row of {metric['split'] or 'training'}"
            content: Any = lines[-1]
        else:
            content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"no {metric['file']}"
    except (OSError, ValueError):
        return f"{metric['file']} cannot be read"
    try:
        value = value_at(content, metric["key"])
    except (KeyError, IndexError, ValueError, TypeError):
        return f"{metric['file']} has no {metric['key']}"
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        return f"{metric['key']} is no number"
    return "not finite" if value is None or not math.isfinite(value) else float(value)


def value_at(content: Any, path: str) -> Any:
    """Return the value at a dotted path; numbers in the path are positions in lists.

    Raises:
        KeyError, IndexError, ValueError, TypeError: There is no such value.
    """
    for name in path.split("."):
        content = content[int(name)] if isinstance(content, list) else content[name]
    return content


def read_metrics(path: Path, split: str | None) -> list[dict[str, Any]]:
    """Read the lines of a metrics file: of a validation split, or of training.

    Raises:
        OSError, ValueError: The file cannot be read.
    """
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if isinstance(line, dict) and line.get("split") == split]
