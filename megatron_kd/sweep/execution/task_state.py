"""Read from a sweep's folder which tasks are done: records of commands, and files of runs."""

from __future__ import annotations

import fnmatch
import json
import tomllib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from megatron_kd.config import ConfigError, RunConfig
from megatron_kd.storage.atomic_files import write_atomically
from megatron_kd.sweep.definition.tasks import Sweep, Task, TaskStep, config_digest, match_tasks
from megatron_kd.sweep.file_names import RECORDS_FOLDER


class TaskState(Enum):
    """Name the states of a task or of one of its steps.

    DONE: finished with the present definition. OPEN: not started, or not finished. CHANGED: begun
    or finished, but with another definition or from other inputs.
    """

    DONE = "done"
    OPEN = "open"
    CHANGED = "changed"


@dataclass(frozen=True)
class TaskStatus:
    """Hold the state of a task or step.

    Attributes:
        reason: Why the state is CHANGED.
        completion_id: Name of this completion, recorded by everything that is made from it. Empty
            while the task is not done.
    """

    state: TaskState
    reason: str = ""
    completion_id: str = ""


class SweepFolder:
    """Locate and read the files that tasks leave in a sweep's folder."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def records(self, task: Task) -> Path:
        """Return the folder of a task's logs, records and lock."""
        return self.out / task.folder / RECORDS_FOLDER

    def log(self, task: Task, step: TaskStep) -> Path:
        """Return the file with the output of a step."""
        return self.records(task) / f"{step.name}.log"

    def record(self, task: Task, step: TaskStep) -> Path:
        """Return the file that exists once the step succeeded."""
        return self.records(task) / f"{step.name}.json"

    def start_record(self, task: Task, step: TaskStep) -> Path:
        """Return the file with the content of the record, written before the step starts."""
        return self.records(task) / f"{step.name}.begun.json"

    def task_status(self, task: Task, needs: Mapping[str, TaskStatus]) -> TaskStatus:
        """Return the status of a task: that of its first step that is not done, or of its last.

        Args:
            task: The task.
            needs: Status of the tasks that it needs, by name.
        """
        inputs = {name: needs[name].completion_id for name in task.needs}
        status = TaskStatus(TaskState.OPEN)
        for step in task.steps:
            status = self.step_status(task, step, inputs)
            if status.state is not TaskState.DONE:
                return status
            inputs = {"run": status.completion_id}
        return status

    def step_status(self, task: Task, step: TaskStep, inputs: Mapping[str, str]) -> TaskStatus:
        """Return the status of a step.

        A command is done if there is a record with its definition and these inputs. A run is done
        by its own status.json and config.toml, with or without a record.

        Args:
            task: The task of the step.
            step: The step.
            inputs: Completion ids of what the step is made from, by name.
        """
        record = _read(self.record(task, step))
        if step.config is not None:
            status = self._run_status(task, step, record, inputs)
        elif record is None:
            return TaskStatus(TaskState.OPEN)
        elif record.get("digest") != step.digest:
            status = TaskStatus(TaskState.CHANGED, "its command is another one now")
        else:
            status = TaskStatus(TaskState.DONE, completion_id=str(record.get("id")))
        reason = "" if record is None else _input_change(record.get("inputs", {}), inputs)
        if reason and status.state is TaskState.DONE:
            return TaskStatus(TaskState.CHANGED, reason)
        return status

    def _run_status(
        self,
        task: Task,
        step: TaskStep,
        record: Mapping[str, Any] | None,
        inputs: Mapping[str, str],
    ) -> TaskStatus:
        directory = self.out / task.folder
        assert step.config is not None
        finished = (_read(directory / "status.json") or {}).get("state") == "finished"
        has_checkpoint = any((directory / "checkpoints").glob("step-*"))
        if not finished and not has_checkpoint:
            return TaskStatus(TaskState.OPEN)
        changes = _setting_changes(directory / "config.toml", step.config)
        if changes:
            return TaskStatus(TaskState.CHANGED, f"it was started with other settings ({changes})")
        at_start = record or _read(self.start_record(task, step)) or {}
        reason = _input_change(at_start.get("inputs", {}), inputs)
        if reason:
            return TaskStatus(TaskState.CHANGED, reason)
        if not finished:
            return TaskStatus(TaskState.OPEN)
        return TaskStatus(TaskState.DONE, completion_id=str(at_start.get("id", step.digest)))

    def complete_records(self, task: Task) -> None:
        """Write missing records of a task whose runs are all finished.

        A record is missing where no process was left to write it, or where the run file has other
        defaults now.
        """
        for step in task.steps:
            path = self.record(task, step)
            record = _read(path)
            if step.config is not None and (record is None or record.get("digest") != step.digest):
                content = (
                    record
                    or _read(self.start_record(task, step))
                    or {"id": step.digest, "inputs": {}}
                )
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, {**content, "digest": step.digest})


def read_statuses(sweep: Sweep, tasks: Mapping[str, Task] | None = None) -> dict[str, TaskStatus]:
    """Return the status of every task by name. Nothing is changed.

    Args:
        sweep: The sweep.
        tasks: Tasks to read, with all that they need, in their order. Default: all.
    """
    folder = SweepFolder(sweep.out)
    statuses: dict[str, TaskStatus] = {}
    for name, task in (sweep.tasks if tasks is None else tasks).items():
        statuses[name] = folder.task_status(task, statuses)
    return statuses


def refuse_changed(sweep: Sweep, tasks: Mapping[str, Task]) -> None:
    """Raise ConfigError if a task was begun or done with another definition than its present one.

    Args:
        sweep: The sweep.
        tasks: Tasks to check, with all that they need.

    Raises:
        ConfigError: A task is CHANGED.
    """
    statuses = read_statuses(sweep, tasks)
    changed = [name for name in tasks if statuses[name].state is TaskState.CHANGED]
    if not changed:
        return
    others = f" ({len(changed) - 1} more are changed too)" if len(changed) > 1 else ""
    name = changed[0]
    raise ConfigError(
        f"{name!r} is in {sweep.out / sweep.tasks[name].folder} already, and "
        f"{statuses[name].reason}{others}: take the change back, choose another --output, "
        f"or do it again with --redo {_shell_quoted(name)}"
    )


def redo(sweep: Sweep, globs: Sequence[str], *, dry_run: bool = False) -> list[str]:
    """Move tasks and all that was made from them aside, so that they are done again.

    Nothing is deleted: folders go to aside/. A glob that ends in measure-N moves only the record
    of that measurement.

    Args:
        sweep: The sweep.
        globs: Patterns for names of tasks.
        dry_run: Move nothing.

    Returns:
        Names of what is moved.

    Raises:
        ConfigError: A glob matches nothing.
    """
    measures = [glob for glob in globs if "measure-" in glob]
    moved = _redo_measures(sweep, measures, dry_run)
    names = set(match_tasks(sweep, [glob for glob in globs if glob not in measures], "--redo"))
    for name, task in sweep.tasks.items():
        if names & set(task.needs):
            names.add(name)
    for name in [name for name in sweep.tasks if name in names]:
        source = sweep.out / sweep.tasks[name].folder
        if not source.exists():
            continue
        moved.append(name)
        if not dry_run:
            target = _unused_folder(sweep.out / "aside", sweep.tasks[name].folder)
            target.parent.mkdir(exist_ok=True)
            source.rename(target)
    return moved


def _unused_folder(parent: Path, folder: str) -> Path:
    number = 1
    while (path := parent / f"{folder.replace('/', '-')}-{number}").exists():
        number += 1
    return path


def _redo_measures(sweep: Sweep, globs: Sequence[str], dry_run: bool) -> list[str]:
    folder, moved = SweepFolder(sweep.out), []
    for glob in globs:
        head, _, number = glob.rpartition("measure-")  # such as "alpha *measure-2"
        for name in match_tasks(sweep, [head.strip(" ,") or "*"], "--redo"):
            for step in sweep.tasks[name].steps:
                record = folder.record(sweep.tasks[name], step)
                if fnmatch.fnmatchcase(step.name, f"measure-{number}") and record.exists():
                    moved.append(f"{name}, {step.name}")
                    if not dry_run:
                        record.replace(record.with_suffix(".aside"))
    return moved


def new_record(
    step: TaskStep, inputs: Mapping[str, str], provenance: Mapping[str, str]
) -> dict[str, Any]:
    """Return the record of a step that is about to start, with a new completion id.

    Args:
        step: The step.
        inputs: Completion ids of what it is made from, by name.
        provenance: Commit, machine and time.
    """
    return {"digest": step.digest, "id": uuid.uuid4().hex, "inputs": dict(inputs), **provenance}


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _read(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None for a missing or damaged file, which is no evidence of anything."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _input_change(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return why something made from `before` is not made from `now`; "" if they are equal."""
    if before.keys() != now.keys():
        return "it needs other jobs now than it was made with"
    other = [name for name in now if before[name] != now[name]]
    if not other:
        return ""
    return f"{other[0]!r}, which it was made from, has been made again since, or is gone"


def _setting_changes(path: Path, config: RunConfig) -> str:
    """Return the first keys in which a run's config.toml differs from `config`; "" if none."""
    try:
        stored = RunConfig.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return "its config.toml cannot be read"
    if config_digest(stored) == config_digest(config):
        return ""
    before, now = _flatten(stored.model_dump(mode="json")), _flatten(config.model_dump(mode="json"))
    keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    changes = [
        f"{key}: {json.dumps(before.get(key))} then, {json.dumps(now.get(key))} now"
        for key in keys[:3]
    ]
    return "; ".join(changes) + (f"; and {len(keys) - 3} more" if len(keys) > 3 else "")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            values |= _flatten(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values


def _shell_quoted(name: str) -> str:
    return "'" + name.replace("'", "'\"'\"'") + "'"
