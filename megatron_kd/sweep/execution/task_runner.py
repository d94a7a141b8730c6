"""Run one task: lock it, start its steps, watch them, and retry what may fail transiently."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_kd.storage.directory_lock import DirectoryLock, DirectoryLockedError
from megatron_kd.storage.exit_codes import BAD_INPUT, DO_NOT_RESTART, FINISHED, REQUEUE
from megatron_kd.sweep.definition.tasks import REPO, Task, TaskStep
from megatron_kd.sweep.execution.task_state import (
    SweepFolder,
    TaskState,
    TaskStatus,
    new_record,
    write_json,
)

_SUPERVISE = str(Path(__file__).with_name("supervise.py"))
_MAX_REQUEUES_AT_ONE_STEP = 3

Result = Literal["done", "interrupted", "stopped", "failed", "blocked"]


@dataclass(frozen=True)
class TaskOutcome:
    """Hold the result of a task.

    Attributes:
        result: "interrupted": stopped on request, resumable. "stopped": not to be started again
            automatically. "blocked": needs a task that failed.
        completion_id: Name of the completion of a task that is done.
    """

    result: Result
    message: str = ""
    seconds: float = 0.0
    completion_id: str = ""


@dataclass(frozen=True)
class _Attempt:
    """Hold how one start of a step ended.

    Attributes:
        state: State that this attempt wrote to status.json; "" if it wrote none.
        training_step: Step that status.json names.
    """

    exit_code: int
    state: str = ""
    training_step: Any = None


@dataclass
class _Retries:
    """Count failures of a step, and requeues without progress."""

    failures: int = 0
    requeues: int = 0
    training_step: Any = None

    def count_requeue(self, training_step: Any) -> None:
        self.requeues = self.requeues + 1 if training_step == self.training_step else 0
        self.training_step = training_step


class TaskRunner:
    """Run tasks from several threads until it is stopped.

    Args:
        out: Folder of the sweep.
        threads: Threads of the numerical libraries in the processes of one task.
        retries: How often a step that failed is started again.
        provenance: Commit and machine, put into every record.
    """

    def __init__(
        self,
        out: Path,
        *,
        threads: int,
        retries: int,
        provenance: Mapping[str, str],
    ) -> None:
        self.folder = SweepFolder(out)
        self._threads = threads
        self._retries = retries
        self._provenance = provenance
        self._stopping = threading.Event()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._guard = threading.Lock()

    @property
    def stopping(self) -> bool:
        """Return True after `stop`."""
        return self._stopping.is_set()

    def stop(self, number: int) -> None:
        """Start nothing more and send the signal `number` to every running step.

        A run saves and exits on SIGTERM. SIGKILL ends all processes of every step at once.
        """
        with self._guard:
            self._stopping.set()
            for process in self._running:
                if process.poll() is not None:
                    continue
                # Every step has its own session, so that a signal reaches it once.
                if number == signal.SIGKILL:
                    os.killpg(process.pid, number)
                else:
                    process.send_signal(number)

    def run(self, task: Task, needs: Mapping[str, str]) -> TaskOutcome:
        """Run all steps of a task that are not done yet.

        Args:
            task: The task.
            needs: Completion ids of the tasks that it needs, by name. All are done.

        Returns:
            The result. Failures are results too.
        """
        start_time = time.monotonic()
        lock = self._lock(task)
        if lock is None:
            return TaskOutcome("interrupted", "was waiting for another process")
        try:
            inputs: dict[str, str] = dict(needs)
            completion_id = ""
            for step in task.steps:
                outcome = self._run_step(task, step, inputs, lock)
                if outcome.result != "done":
                    return outcome
                completion_id = outcome.completion_id
                inputs = {"run": completion_id}
            self.folder.complete_records(task)
            seconds = time.monotonic() - start_time
            return TaskOutcome("done", seconds=seconds, completion_id=completion_id)
        except OSError as error:
            return TaskOutcome("failed", f"{error.filename}: {error.strerror}")
        finally:
            lock.release()

    def _lock(self, task: Task) -> DirectoryLock | None:
        """Lock the task; wait for an array task, or for what an earlier start left running."""
        reported = False
        while not self.stopping:
            try:
                return DirectoryLock(self.folder.records(task))
            except DirectoryLockedError as error:
                if not reported:
                    print_line(f"{task.name}: {_locked_message(error)}")
                reported = True
                self._stopping.wait(0.3)
        return None

    def _run_step(
        self, task: Task, step: TaskStep, inputs: Mapping[str, str], lock: DirectoryLock
    ) -> TaskOutcome:
        retries = _Retries()
        while True:
            status = self.folder.step_status(task, step, inputs)
            if status.state is TaskState.DONE:
                return TaskOutcome("done", completion_id=status.completion_id)
            if status.state is TaskState.CHANGED:
                return TaskOutcome("stopped", status.reason)
            if self.stopping:
                reason = "stop requested" if retries.failures else "not begun"
                return TaskOutcome("interrupted", reason)
            attempt = self._start(task, step, inputs, lock)
            outcome = self._final_outcome(task, step, inputs, attempt, retries)
            if outcome is not None:
                return outcome

    def _final_outcome(
        self,
        task: Task,
        step: TaskStep,
        inputs: Mapping[str, str],
        attempt: _Attempt,
        retries: _Retries,
    ) -> TaskOutcome | None:
        """Return the outcome of an attempt, or None if the step has to be looked at again."""
        log = self.folder.log(task, step)
        if attempt.exit_code == FINISHED or attempt.state == "finished":
            if self.folder.step_status(task, step, inputs).state is TaskState.DONE:
                return None
            return TaskOutcome("failed", f"{step.name} ended with 0 and is not finished: see {log}")
        if self.stopping:
            return TaskOutcome("interrupted", "stop requested")
        message = f"{step.name} ended with {attempt.exit_code}: {last_line(log)}"
        if attempt.state == "stopped" or attempt.exit_code in (BAD_INPUT, DO_NOT_RESTART):
            return TaskOutcome("stopped", message)
        if attempt.state == "requeue" or attempt.exit_code == REQUEUE:
            retries.count_requeue(attempt.training_step)
            if retries.requeues < _MAX_REQUEUES_AT_ONE_STEP:
                return None
            return TaskOutcome(
                "failed",
                f"{message} (requested a restart {_MAX_REQUEUES_AT_ONE_STEP + 1} times "
                "without a further step)",
            )
        retries.failures += 1
        if retries.failures > self._retries:
            return TaskOutcome("failed", message)
        print_line(f"{task.name}: {message}; once more")
        return None

    def _start(
        self, task: Task, step: TaskStep, inputs: Mapping[str, str], lock: DirectoryLock
    ) -> _Attempt:
        """Start a step and wait for it."""
        log = self.folder.log(task, step)
        content = new_record(
            step, inputs, {**self._provenance, "time": time.strftime("%Y-%m-%d %H:%M:%S")}
        )
        write_json(self.folder.start_record(task, step), content)
        with open(log, "a", encoding="utf-8", errors="surrogateescape") as stream:
            stream.write(f"== {content['time']} {shlex.join(step.argv)}\n")
        status_path = self.folder.out / task.folder / "status.json"
        status_before = _read_bytes(status_path)
        arguments = [str(log), str(self.folder.record(task, step)), json.dumps(content)]
        command = [
            *(sys.executable, "-I", "-S", _SUPERVISE),
            *arguments,
            *(str(lock.descriptor), *step.argv),
        ]
        exit_code = self._wait_for(command, task, lock)
        status = _read_bytes(status_path)
        if step.config is None or status == status_before:
            return _Attempt(exit_code)
        values = _parse_status(status)
        return _Attempt(exit_code, str(values.get("state", "")), values.get("step"))

    def _wait_for(self, command: list[str], task: Task, lock: DirectoryLock) -> int:
        """Start a command and return its exit code; 128 + N for a process that signal N ended."""
        with self._guard:
            if self.stopping:
                return 128 + signal.SIGTERM
            process = subprocess.Popen(
                command,
                cwd=REPO,
                env=self._environment(task),
                # A reader of the sweep's own output would wait for a step that outlives the sweep.
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[lock.descriptor],
                start_new_session=True,
            )
            self._running.add(process)
        try:
            exit_code = process.wait()
        finally:
            with self._guard:
                self._running.discard(process)
        return exit_code if exit_code >= 0 else 128 - exit_code

    def _environment(self, task: Task) -> dict[str, str]:
        """Return the environment of a task. A number of threads that the user set is kept."""
        threads = str(max(1, self._threads // task.ranks))
        return {"OMP_NUM_THREADS": threads, **os.environ}


def print_line(line: str) -> None:
    """Print a line for the user on stderr, at once."""
    print(f"sweep: {line}", file=sys.stderr, flush=True)


def last_line(path: Path) -> str:
    """Return the last line of a log that is not empty, without control characters."""
    try:
        with open(path, "rb") as stream:
            stream.seek(max(0, path.stat().st_size - 4096))
            lines = stream.read().decode(errors="replace").split("\n")
    except OSError:
        return "no log"
    text = next((line.strip() for line in reversed(lines) if line.strip()), "nothing was printed")
    return "".join(character if character.isprintable() else " " for character in text)[-300:]


def completion_ids(task: Task, statuses: Mapping[str, TaskStatus]) -> dict[str, str]:
    """Return the completion ids of what a task needs, by name."""
    return {name: statuses[name].completion_id for name in task.needs}


def _locked_message(error: DirectoryLockedError) -> str:
    if error.owner is None:
        return str(error)
    return f"is being worked on by {error.owner}, or by what it started: waiting for it"


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _parse_status(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
