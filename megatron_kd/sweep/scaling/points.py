"""Read the points of a scaling law from tables and from the directories of finished runs."""

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
from megatron_kd.sweep.scaling.fit import ScalingPoint

_COLUMNS = ("parameters", "tokens", "loss")


def read_table(path: Path) -> list[ScalingPoint]:
    """Return the points of a .csv file with a header, or of a .json list of objects.

    Their keys are parameters (without embeddings), tokens, loss and teacher_loss. A teacher_loss
    that is empty (in JSON: null or missing) means that the run had no teacher.

    Raises:
        ConfigError: if the file cannot be read; the message names the wrong run.
    """
    try:
        text = path.read_text(encoding="utf-8")
        is_json = path.suffix == ".json"
        runs = json.loads(text) if is_json else list(csv.DictReader(text.splitlines()))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, ValueError, csv.Error) as error:
        kind = "JSON" if path.suffix == ".json" else "CSV"
        raise ConfigError(f"{path} cannot be read as {kind} ({error})") from None
    if not isinstance(runs, list) or not runs or not all(isinstance(run, Mapping) for run in runs):
        raise ConfigError(
            f"{path} must list at least one run with columns {', '.join(_COLUMNS)} and teacher_loss"
        )
    return [_point(run, f"{path}, run {number}") for number, run in enumerate(runs, 1)]


def _point(run: Mapping[str, Any], place: str) -> ScalingPoint:
    """Return the point of one run of a table; `place` names it in the message of an error."""
    values: dict[str, float] = {}
    for name in (*_COLUMNS, "teacher_loss"):
        cell = run.get(name)
        if cell is None or str(cell).strip() == "":
            if name != "teacher_loss":
                raise ConfigError(f"{place} has no {name}")
            continue
        try:
            values[name] = float(cell)
        except (TypeError, ValueError):
            raise ConfigError(f"{place} has {name} = {cell!r}, which is not a number") from None
        if not 0 < values[name] < float("inf"):
            raise ConfigError(f"{place} has {name} = {cell}: it must be positive and finite")
    return ScalingPoint(**values)


def read_run(
    directory: Path, *, split: str | None = None, evaluations: Iterable[Path] = ()
) -> ScalingPoint:
    """Return the point of a finished run.

    It consists of the model's parameters without embeddings, the tokens, and the last validation
    loss.

    Args:
        directory: the run directory.
        split: name of the validation set; None where the run has only one.
        evaluations: JSON files of tools/evaluate.py. The teacher's loss is searched there before it
            is searched in the teacher's run directory.

    Raises:
        ConfigError: if files are missing or damaged, the run did not reach its last step, or the
            teacher's loss cannot be found.
    """
    content = _read_config(directory)
    validation = _last_validation(directory, split)
    steps = content.get("train", {}).get("steps")
    if validation["step"] != steps:
        raise ConfigError(
            f"{directory} was last validated at step {validation['step']} of {steps}: a run counts "
            "when it is finished"
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
                f"{directory / 'config.toml'} does not name teacher.checkpoint: give this run in a "
                "table, with its teacher_loss"
            )
        checkpoint, set_name = Path(teacher["checkpoint"]).resolve(), str(validation["split"])
        teacher_loss = _evaluated_loss(checkpoint, set_name, evaluations)
        if teacher_loss is None:
            teacher_loss = _own_validation_loss(checkpoint, set_name, directory)
    return ScalingPoint(
        parameters=float(parameter_count(model, 0)),
        tokens=float(validation["tokens"]),
        loss=float(validation["ce_loss"]),
        teacher_loss=teacher_loss,
    )


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: {directory} is not a run directory") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error})") from None


def _read_records(directory: Path) -> list[dict[str, Any]]:
    path = directory / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist: {directory} is not a run directory, or the run has not started"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error})") from None


def _last_validation(directory: Path, split: str | None, step: int | None = None) -> dict[str, Any]:
    """Return the last record of a validation set in metrics.jsonl, or the one of a step.

    Args:
        directory: the run directory.
        split: name of the validation set; None where the run has only one.
        step: the step; None: the last one.

    Raises:
        ConfigError: if there is no such record, or its loss is not a number.
    """
    records = [record for record in _read_records(directory) if "split" in record]
    splits = list(dict.fromkeys(str(record["split"]) for record in records))
    if split is None and len(splits) > 1:
        raise ConfigError(
            f"{directory} has the validation sets {', '.join(splits)}: choose one with --split"
        )
    name = split or (splits[0] if splits else "")
    matching = [
        record
        for record in records
        if str(record["split"]) == name and (step is None or record["step"] == step)
    ]
    if not matching:
        of_set = f" of {name}" if name else ""
        at_step = f" at step {step}" if step is not None else ""
        raise ConfigError(
            f"{directory} has no validation losses{of_set}{at_step}: it needs data.valid"
        )
    loss = matching[-1].get("ce_loss")
    if not isinstance(loss, float | int):
        raise ConfigError(f"{directory}: the last validation loss is {loss}, which is not a number")
    return dict(matching[-1])


def _evaluated_loss(checkpoint: Path, split: str, evaluations: Iterable[Path]) -> float | None:
    """Return the loss of a checkpoint on a validation set by its evaluations, or None."""
    for path in evaluations:
        evaluation = read_json(path, setting="--evaluation")
        evaluated = Path(str(evaluation.get("checkpoint", ""))).resolve()
        if evaluated != checkpoint and checkpoint not in evaluated.parents:
            continue
        result = evaluation.get("results", {}).get(split, {})
        if "cross_entropy" in result:
            return float(result["cross_entropy"])
    return None


def _own_validation_loss(checkpoint: Path, split: str, student: Path) -> float:
    """Return the loss of a teacher on a validation set by the metrics of its own run.

    Args:
        checkpoint: the teacher's run directory, or a checkpoint in it.
        split: name of the validation set.
        student: run directory of its student, for the message of an error.
    """
    folders = (checkpoint, *checkpoint.parents[:2])
    run_directory = next(
        (folder for folder in folders if (folder / "metrics.jsonl").is_file()), None
    )
    if run_directory is None:
        raise ConfigError(
            f"the teacher of {student}, {checkpoint}, has no metrics.jsonl: measure it on {split} "
            "with tools/evaluate.py perplexity --json, and give that file as --evaluation"
        )
    number = checkpoint.name.removeprefix("step-")
    step = int(number) if number.isdigit() else None
    return float(_last_validation(run_directory, split, step)["ce_loss"])
