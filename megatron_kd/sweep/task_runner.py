"""One task: held, started, watched, started again where that may help."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_kd.storage.directory_lock import DirectoryLock, DirectoryLockedError
from megatron_kd.storage.exit_codes import BAD_INPUT, DO_NOT_RESTART, FINISHED, REQUEUE
from megatron_kd.sweep.grid import REPO, Step, Task
from megatron_kd.sweep.task_state import Folder, Found, State, new_record, write_json

_SUPERVISE = str(Path(__file__).with_name("supervise.py"))
_SAME_STEP = 3

Word = Literal["done", "left", "stopped", "failed", "blocked"]


@dataclass(frozen=True)
class Outcome:
    """What became of a task. left: asked to leave, goes on when started again. stopped: not to be started again by itself."""

    word: Word
    message: str = ""
    seconds: float = 0.0
    id: str = ""


class Shop:
    """Starts the steps of tasks, from several threads, until it is told to stop.

    threads: of the numerical libraries in each process. retries: of a step that failed. provenance: put into every record.
    """

    def __init__(
        self,
        out: Path,
        *,
        threads: int,
        retries: int,
        provenance: Mapping[str, str],
        say: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self.folder, self._threads, self._retries, self._provenance, self._say = (
            Folder(out),
            threads,
            retries,
            provenance,
            say,
        )
        self._stopping = threading.Event()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._guard = threading.Lock()

    @property
    def stopping(self) -> bool:
        """Whether it was told to."""
        return self._stopping.is_set()

    def stop(self, number: int) -> None:
        """Start nothing more and send `number` to what runs: a run saves and leaves. SIGKILL ends everything at once."""
        with self._guard:
            self._stopping.set()
            for process in self._running:
                if process.poll() is None:
                    # Each has a session of its own, so that a signal reaches it once.
                    os.killpg(
                        process.pid, number
                    ) if number == signal.SIGKILL else process.send_signal(number)

    def perform(self, task: Task, needs: Mapping[str, str]) -> Outcome:
        """All steps that are not done yet. needs: name -> id of what it needs, all done."""
        began = time.monotonic()
        notes = self.folder.notes(task)
        lock = self._hold(task, notes)
        if lock is None:
            return Outcome("left", "was waiting for another process")
        try:
            inputs: dict[str, str] = dict(needs)
            for step in task.steps:
                outcome = self._step(task, step, inputs, lock)
                if outcome.word != "done":
                    return outcome
                inputs = {"run": outcome.id}
            self.folder.settle(task)
            return Outcome("done", seconds=time.monotonic() - began, id=outcome.id)
        except OSError as error:
            return Outcome("failed", f"{error.filename}: {error.strerror}")
        finally:
            lock.release()

    def _hold(self, task: Task, notes: Path) -> DirectoryLock | None:
        """The task for this process alone. What an earlier start left running, or an array task has, is waited for."""
        told = False
        while not self.stopping:
            try:
                return DirectoryLock(notes)
            except DirectoryLockedError as error:
                if not told:
                    self._say(f"{task.name}: {_locked_message(error)}")
                told = True
                self._stopping.wait(0.3)
        return None

    def _step(
        self, task: Task, step: Step, inputs: Mapping[str, str], lock: DirectoryLock
    ) -> Outcome:
        failures, stuck, at = 0, 0, None
        while True:
            found = self.folder.step_state(task, step, inputs)
            if found.state is State.DONE:
                return Outcome("done", id=found.id)
            if found.state is State.CHANGED:
                return Outcome("stopped", found.reason)
            if self.stopping:
                return Outcome("left", "not begun" if failures == 0 else "asked to leave")
            code, state, reached = self._start(task, step, inputs, lock)
            if code == FINISHED or state == "finished":
                if self.folder.step_state(task, step, inputs).state is State.DONE:
                    continue
                return Outcome(
                    "failed",
                    f"{step.name} ended with 0 and is not finished: see {self.folder.log(task, step)}",
                )
            if self.stopping:
                return Outcome("left", "asked to leave")
            message = f"{step.name} ended with {code}: {last_line(self.folder.log(task, step))}"
            if state == "stopped" or code in (BAD_INPUT, DO_NOT_RESTART):
                return Outcome("stopped", message)
            if state == "requeue" or code == REQUEUE:
                stuck, at = (stuck + 1 if reached == at else 0), reached
                if stuck >= _SAME_STEP:
                    return Outcome(
                        "failed",
                        f"{message} (asked to go on {_SAME_STEP + 1} times without a further step)",
                    )
                continue
            failures += 1
            if failures > self._retries:
                return Outcome("failed", message)
            self._say(f"{task.name}: {message}; once more")

    def _start(
        self, task: Task, step: Step, inputs: Mapping[str, str], lock: DirectoryLock
    ) -> tuple[int, str, Any]:
        """Exit code, the state that this attempt left in status.json ("" where it wrote none), and the step it names."""
        record, log = self.folder.record(task, step), self.folder.log(task, step)
        content = new_record(
            step, inputs, {**self._provenance, "time": time.strftime("%Y-%m-%d %H:%M:%S")}
        )
        write_json(self.folder.begun(task, step), content)
        with open(log, "a", encoding="utf-8", errors="surrogateescape") as out:
            out.write(f"== {content['time']} {shlex.join(step.argv)}\n")
        status = self.folder.out / task.folder / "status.json"
        before = _bytes(status)
        supervisor = [
            sys.executable,
            "-I",
            "-S",
            _SUPERVISE,
            str(log),
            str(record),
            json.dumps(content),
            str(lock.descriptor),
        ]
        with self._guard:
            if self.stopping:
                return 128 + signal.SIGTERM, "", None
            process = subprocess.Popen(
                [*supervisor, *step.argv],
                cwd=REPO,
                env=self._environment(task),
                # Nothing of the sweep's own: who reads from it would wait for what outlives it.
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[lock.descriptor],
                start_new_session=True,
            )
            self._running.add(process)
        try:
            code = process.wait()
        finally:
            with self._guard:
                self._running.discard(process)
        after = _bytes(status)
        found = _status(after) if step.config is not None and after != before else {}
        return code if code >= 0 else 128 - code, str(found.get("state", "")), found.get("step")

    def _environment(self, task: Task) -> dict[str, str]:
        """What a process is started with. A number of threads that the user set is kept."""
        threads = str(max(1, self._threads // task.ranks))
        return {"OMP_NUM_THREADS": threads, **os.environ}


def last_line(path: Path) -> str:
    """The last line of a log that is not empty, as it may be shown."""
    try:
        with open(path, "rb") as stream:
            stream.seek(max(0, path.stat().st_size - 4096))
            lines = stream.read().decode(errors="replace").split("\n")
    except OSError:
        return "no log"
    text = next((line.strip() for line in reversed(lines) if line.strip()), "nothing was printed")
    return "".join(character if character.isprintable() else " " for character in text)[-300:]


def _locked_message(error: DirectoryLockedError) -> str:
    if error.owner is None:
        return str(error)
    return f"is being worked on by {error.owner}, or by what it started: waiting for it"


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _status(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def needs_of(task: Task, found: Mapping[str, Found]) -> dict[str, str]:
    """name -> id of what a task needs."""
    return {name: found[name].id for name in task.needs}
