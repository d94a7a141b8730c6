"""What of a sweep is done, as its folder says: records that commands leave when they end well, and the runs' own files."""

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
from megatron_kd.sweep.grid import Step, Sweep, Task, config_digest, matching

NOTES = "sweep"


class State(Enum):
    """open: not started, or half-done. changed: begun or done, but of another definition."""

    DONE = "done"
    OPEN = "open"
    CHANGED = "changed"


@dataclass(frozen=True)
class Found:
    """reason: of CHANGED. id: of this completion, by which what was made of it is known; "" while it is not done."""

    state: State
    reason: str = ""
    id: str = ""


class Folder:
    """A sweep's folder as it is now."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def notes(self, task: Task) -> Path:
        """Where logs, records and the lock of a task are."""
        return self.out / task.folder / NOTES

    def log(self, task: Task, step: Step) -> Path:
        """What a step printed."""
        return self.notes(task) / f"{step.name}.log"

    def record(self, task: Task, step: Step) -> Path:
        """Exists when the step ended well."""
        return self.notes(task) / f"{step.name}.json"

    def begun(self, task: Task, step: Step) -> Path:
        """What the record would hold, from before the start."""
        return self.notes(task) / f"{step.name}.begun.json"

    def task_state(self, task: Task, needs: Mapping[str, Found]) -> Found:
        """Of all its steps; id: of its last one. needs: what is known of the tasks it needs."""
        inputs = {name: needs[name].id for name in task.needs}
        last = Found(State.OPEN)
        for step in task.steps:
            last = self.step_state(task, step, inputs)
            if last.state is not State.DONE:
                return last
            inputs = {"run": last.id}
        return last

    def step_state(self, task: Task, step: Step, inputs: Mapping[str, str]) -> Found:
        """Done only by a record of this definition and of these inputs, and for a run by its own status.json and config.toml."""
        record = _read(self.record(task, step))
        if step.config is not None:
            found = self._run_state(task, step, record, inputs)
        elif record is None:
            return Found(State.OPEN)
        else:
            found = Found(State.DONE, id=str(record.get("id")))
            if record.get("digest") != step.digest:
                found = Found(State.CHANGED, "its command is another one now")
        stale = "" if record is None else _stale(record.get("inputs", {}), inputs)
        return Found(State.CHANGED, stale) if stale and found.state is State.DONE else found

    def _run_state(
        self, task: Task, step: Step, record: Mapping[str, Any] | None, inputs: Mapping[str, str]
    ) -> Found:
        directory = self.out / task.folder
        assert step.config is not None
        finished = (_read(directory / "status.json") or {}).get("state") == "finished"
        begun = any((directory / "checkpoints").glob("step-*"))
        if not finished and not begun:
            return Found(State.OPEN)
        changes = _changes(directory / "config.toml", step.config)
        if changes:
            return Found(State.CHANGED, f"it was started with other settings ({changes})")
        before = record or _read(self.begun(task, step)) or {}
        stale = _stale(before.get("inputs", {}), inputs)
        if stale:
            return Found(State.CHANGED, stale)
        if not finished:
            return Found(State.OPEN)
        return Found(State.DONE, id=str(before.get("id", step.digest)))

    def settle(self, task: Task) -> None:
        """Write the record of a run that is done, where nobody was left to note it, or a program of other defaults has."""
        for step in task.steps:
            path = self.record(task, step)
            record = _read(path)
            if step.config is not None and (record is None or record.get("digest") != step.digest):
                content = (
                    record or _read(self.begun(task, step)) or {"id": step.digest, "inputs": {}}
                )
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, {**content, "digest": step.digest})


def look(sweep: Sweep, tasks: Mapping[str, Task] | None = None) -> dict[str, Found]:
    """State of every task, or of `tasks`, which hold all that they need, in their order. Changes nothing."""
    folder = Folder(sweep.out)
    found: dict[str, Found] = {}
    for name, task in (sweep.tasks if tasks is None else tasks).items():
        found[name] = folder.task_state(task, found)
    return found


def refuse_changed(sweep: Sweep, tasks: Mapping[str, Task]) -> None:
    """ConfigError where something of `tasks`, which hold all that they need, was begun or done with another definition than it has now."""
    found = look(sweep, tasks)
    changed = [name for name in tasks if found[name].state is State.CHANGED]
    if not changed:
        return
    others = f" ({len(changed) - 1} more are changed too)" if len(changed) > 1 else ""
    name = changed[0]
    raise ConfigError(
        f"{name!r} is in {sweep.out / sweep.tasks[name].folder} already, and {found[name].reason}{others}: take the change back, choose "
        f"another --output, or do it again with --redo {_quoted(name)}"
    )


def redo(sweep: Sweep, globs: Sequence[str], *, dry_run: bool = False) -> list[str]:
    """Put aside what matches and all that was made from it, so that it is done again; returns the names. Nothing is deleted.

    A glob that ends in measure-N puts aside the record of that measurement only.
    """
    measures = [glob for glob in globs if "measure-" in glob]
    moved = _redo_measures(sweep, measures, dry_run)
    again = set(matching(sweep, [glob for glob in globs if glob not in measures], "--redo"))
    for name, task in sweep.tasks.items():
        if again & set(task.needs):
            again.add(name)
    for name in [name for name in sweep.tasks if name in again]:
        source = sweep.out / sweep.tasks[name].folder
        if not source.exists():
            continue
        moved.append(name)
        number = 1
        while (
            target := sweep.out / "aside" / f"{sweep.tasks[name].folder.replace('/', '-')}-{number}"
        ).exists():
            number += 1
        if not dry_run:
            target.parent.mkdir(exist_ok=True)
            source.rename(target)
    return moved


def _redo_measures(sweep: Sweep, globs: Sequence[str], dry_run: bool) -> list[str]:
    folder, moved = Folder(sweep.out), []
    for glob in globs:
        head, _, number = glob.rpartition("measure-")  # such as "alpha *measure-2"
        for name in matching(sweep, [head.strip(" ,") or "*"], "--redo"):
            for step in sweep.tasks[name].steps:
                record = folder.record(sweep.tasks[name], step)
                if fnmatch.fnmatchcase(step.name, f"measure-{number}") and record.exists():
                    moved.append(f"{name}, {step.name}")
                    if not dry_run:
                        record.replace(record.with_suffix(".aside"))
    return moved


def new_record(
    step: Step, inputs: Mapping[str, str], provenance: Mapping[str, str]
) -> dict[str, Any]:
    """What is noted of a step that is about to start."""
    return {"digest": step.digest, "id": uuid.uuid4().hex, "inputs": dict(inputs), **provenance}


def write_json(path: Path, content: Any) -> None:
    """Atomic."""
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none, or a damaged one, which is then no evidence of anything."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _stale(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Why what was made from `then` is not made from `now`; "" where it is."""
    if then.keys() != now.keys():
        return "it needs other jobs now than it was made with"
    other = [name for name in now if then[name] != now[name]]
    return (
        f"{other[0]!r}, which it was made from, has been made again since, or is gone"
        if other
        else ""
    )


def _changes(path: Path, config: RunConfig) -> str:
    """The first keys in which a run's config.toml differs from `config`; "" where none does."""
    try:
        there = RunConfig.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return "its config.toml cannot be read"
    if config_digest(there) == config_digest(config):
        return ""
    then, now = _flat(there.model_dump(mode="json")), _flat(config.model_dump(mode="json"))
    different = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
    told = [
        f"{key}: {json.dumps(then.get(key))} then, {json.dumps(now.get(key))} now"
        for key in different[:3]
    ]
    return "; ".join(told) + (f"; and {len(different) - 3} more" if len(different) > 3 else "")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


def _quoted(name: str) -> str:
    return "'" + name.replace("'", "'\"'\"'") + "'"
