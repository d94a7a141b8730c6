"""Where the points of a scaling law come from: tables, and the directories of finished runs."""

from __future__ import annotations

import csv
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_kd.config import ConfigError, ModelSection
from megatron_kd.planning.parameters import parameter_count
from megatron_kd.storage.json_files import read_json
from megatron_kd.sweep.scaling.law import Point

_COLUMNS = ("parameters", "tokens", "loss")


def read_table(path: Path) -> list[Point]:
    """Points of a .csv file with a header, or a .json list of objects: parameters (without embeddings), tokens, loss, teacher_loss.

    An empty (JSON: null or missing) teacher_loss says that the run had no teacher. ConfigError names the row that is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
        rows = (
            json.loads(text) if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))
        )
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(
            f"{path} cannot be read as {'JSON' if path.suffix == '.json' else 'CSV'} ({error})"
        ) from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, Mapping) for row in rows):
        raise ConfigError(
            f"{path} must list at least one run with columns {', '.join(_COLUMNS)} and teacher_loss"
        )
    return [_row(row, f"{path}, run {number}") for number, row in enumerate(rows, 1)]


def _row(row: Mapping[str, Any], where: str) -> Point:
    values: dict[str, float] = {}
    for name in (*_COLUMNS, "teacher_loss"):
        given = row.get(name)
        if given is None or str(given).strip() == "":
            if name != "teacher_loss":
                raise ConfigError(f"{where} has no {name}")
            continue
        try:
            values[name] = float(given)
        except (TypeError, ValueError):
            raise ConfigError(f"{where} has {name} = {given!r}, which is not a number") from None
        if not 0 < values[name] < float("inf"):
            raise ConfigError(f"{where} has {name} = {given}: it must be positive and finite")
    return Point(**values)


def read_run(
    directory: Path, *, split: str | None = None, evaluations: Iterable[Path] = ()
) -> Point:
    """The point of a finished run: its model's parameters without embeddings, its tokens, and its last validation loss.

    Args:
        split: name of the validation set; None where the run has one only.
        evaluations: JSON files of tools/evaluate.py, asked for the teacher's loss before its own run directory is.
    Raises:
        ConfigError: files missing or damaged, a run that did not reach its last step, a teacher whose loss is nowhere to be found.
    """
    content = _config(directory)
    row = _last_validation(directory, split)
    steps = content.get("train", {}).get("steps")
    if row["step"] != steps:
        raise ConfigError(
            f"{directory} was last validated at step {row['step']} of {steps}: a run counts when it is finished"
        )
    try:
        model = ModelSection.model_validate(content.get("model", {}))
    except ValidationError as error:
        raise ConfigError(
            f"{directory / 'config.toml'} does not describe a model ({error.errors()[0]['msg']})"
        ) from None
    teacher = content.get("teacher", {})
    teacher_loss = None
    if teacher.get("source", "none") != "none":
        if not teacher.get("checkpoint"):
            raise ConfigError(
                f"{directory / 'config.toml'} does not name teacher.checkpoint: give this run in a table, with its teacher_loss"
            )
        teacher_loss = _teacher_loss(
            Path(teacher["checkpoint"]), str(row["split"]), directory, list(evaluations)
        )
    return Point(
        float(parameter_count(model, 0)), float(row["tokens"]), float(row["ce_loss"]), teacher_loss
    )


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "config.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: {directory} is not a run directory") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error})") from None


def _last_validation(directory: Path, split: str | None, step: int | None = None) -> dict[str, Any]:
    """The last row of a validation set in metrics.jsonl, at `step` where given."""
    path = directory / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist: {directory} is not a run directory, or the run has not started"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error})") from None
    splits = list(dict.fromkeys(str(row["split"]) for row in rows if "split" in row))
    if split is None and len(splits) > 1:
        raise ConfigError(
            f"{directory} has the validation sets {', '.join(splits)}: choose one with --split"
        )
    wanted = split or (splits[0] if splits else "")
    chosen = [
        row
        for row in rows
        if str(row.get("split")) == wanted and (step is None or row["step"] == step)
    ]
    if not chosen:
        at = f" at step {step}" if step is not None else ""
        raise ConfigError(
            f"{directory} has no validation losses{f' of {wanted}' if wanted else ''}{at}: it needs data.valid"
        )
    if not isinstance(chosen[-1].get("ce_loss"), float | int):
        raise ConfigError(
            f"{directory}: the last validation loss is {chosen[-1].get('ce_loss')}, which is not a number"
        )
    return dict(chosen[-1])


def _teacher_loss(checkpoint: Path, split: str, student: Path, evaluations: list[Path]) -> float:
    """The teacher's loss on the student's validation set: from an evaluation of its checkpoint, or from its run's rows."""
    checkpoint = checkpoint.resolve()
    for path in evaluations:
        found = read_json(path, what="--evaluation")
        measured = Path(str(found.get("checkpoint", ""))).resolve()
        if measured != checkpoint and checkpoint not in measured.parents:
            continue
        result = found.get("results", {}).get(split, {})
        if "cross_entropy" in result:
            return float(result["cross_entropy"])
    folder = next(
        (
            each
            for each in (checkpoint, *checkpoint.parents[:2])
            if (each / "metrics.jsonl").is_file()
        ),
        None,
    )
    if folder is None:
        raise ConfigError(
            f"the teacher of {student}, {checkpoint}, has no metrics.jsonl: measure it on {split} with "
            "tools/evaluate.py perplexity --json, and give that file as --evaluation"
        )
    step = (
        int(checkpoint.name.removeprefix("step-"))
        if checkpoint.name.removeprefix("step-").isdigit()
        else None
    )
    return float(_last_validation(folder, split, step)["ce_loss"])
