"""Run ready tasks on this machine, at most N in parallel, in file order."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from megatron_kd.sweep.definition.tasks import Sweep, Task
from megatron_kd.sweep.execution.task_runner import (
    TaskOutcome,
    TaskRunner,
    completion_ids,
    print_line,
)
from megatron_kd.sweep.execution.task_state import TaskState, TaskStatus, read_statuses

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# Results of a task that keep the tasks that need it from running.
FAILURES = ("failed", "stopped", "blocked")


def run_tasks(
    sweep: Sweep, tasks: Mapping[str, Task], runner: TaskRunner, *, workers: int
) -> dict[str, TaskOutcome]:
    """Run the tasks that are not done, at most `workers` at a time.

    On the first signal runs save and exit, and are waited for. The second one ends them at once.
    Must be called in the main thread.

    Args:
        sweep: The sweep.
        tasks: Tasks to run, with all that they need.
        runner: Runs one task.
        workers: Number of tasks at a time.

    Returns:
        The outcome of each task that was not done before, by name.
    """
    statuses = read_statuses(sweep, tasks)
    for name, task in tasks.items():
        if statuses[name].state is TaskState.DONE:
            runner.folder.complete_records(task)
    waiting = {
        name: task for name, task in tasks.items() if statuses[name].state is not TaskState.DONE
    }
    print_line(f"{len(tasks)} tasks, {len(tasks) - len(waiting)} done before, {workers} at a time")
    signals: list[int] = []
    previous = {
        number: signal.signal(number, lambda received, _frame: signals.append(received))
        for number in _STOP_SIGNALS
    }
    try:
        return _LocalRun(waiting, statuses, runner, workers, signals).run()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _LocalRun:
    """Hold the state of one call of `run_tasks`. `signals` grows as signals arrive."""

    def __init__(
        self,
        waiting: dict[str, Task],
        statuses: dict[str, TaskStatus],
        runner: TaskRunner,
        workers: int,
        signals: list[int],
    ) -> None:
        self._waiting = waiting
        self._statuses = statuses
        self._runner = runner
        self._workers = workers
        self._signals, self._handled_signals = signals, 0
        self._running: dict[Future[TaskOutcome], str] = {}
        self._outcomes: dict[str, TaskOutcome] = {}
        self._total, self._start_time = len(waiting), time.monotonic()

    def run(self) -> dict[str, TaskOutcome]:
        with ThreadPoolExecutor(self._workers) as pool:
            while True:
                self._handle_signals()
                self._block()
                if not self._runner.stopping:
                    self._start(pool)
                if not self._running:
                    break
                # A short timeout, because signals are handled between two waits.
                for future in wait(self._running, timeout=0.2, return_when=FIRST_COMPLETED).done:
                    self._finish(self._running.pop(future), future.result())
        for name in self._waiting:
            self._outcomes[name] = TaskOutcome("interrupted", "not begun")
        return self._outcomes

    def _handle_signals(self) -> None:
        while self._handled_signals < len(self._signals):
            number = self._signals[self._handled_signals]
            self._handled_signals += 1
            name = signal.Signals(number).name
            if self._handled_signals == 1:
                print_line(f"{name}: waiting for {len(self._running)} to save and exit")
                self._runner.stop(signal.SIGTERM)
            else:
                print_line(f"{name} again: ending them")
                self._runner.stop(signal.SIGKILL)

    def _block(self) -> None:
        """Give up tasks that need a task that failed."""
        for name, task in list(self._waiting.items()):
            failed = [
                need
                for need in task.needs
                if need in self._outcomes and self._outcomes[need].result in FAILURES
            ]
            if failed:
                del self._waiting[name]
                self._outcomes[name] = TaskOutcome("blocked", f"needs {failed[0]!r}")

    def _start(self, pool: ThreadPoolExecutor) -> None:
        for name, task in list(self._waiting.items()):
            if len(self._running) >= self._workers:
                return
            if all(self._statuses[need].state is TaskState.DONE for need in task.needs):
                del self._waiting[name]
                needs = completion_ids(task, self._statuses)
                self._running[pool.submit(self._runner.run, task, needs)] = name

    def _finish(self, name: str, outcome: TaskOutcome) -> None:
        self._outcomes[name] = outcome
        if outcome.result == "done":
            self._statuses[name] = TaskStatus(TaskState.DONE, completion_id=outcome.completion_id)
            text = f"done in {format_duration(outcome.seconds)}"
        else:
            text = f"{outcome.result}: {outcome.message}"
        position = f"[{len(self._outcomes)}/{self._total}]"
        print_line(f"{position} {name}: {text}{self._rate()}")

    def _rate(self) -> str:
        """Return tasks a minute and the expected remaining time, or "" if unknown."""
        done = sum(outcome.result == "done" for outcome in self._outcomes.values())
        remaining = self._total - len(self._outcomes)
        if not done or not remaining:
            return ""
        elapsed = time.monotonic() - self._start_time
        rest = format_duration(elapsed / done * remaining)
        return f"  {done / elapsed * 60:.2g} a minute, ETA {rest}"


def format_duration(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds, such as 1:02:03."""
    total = round(seconds)
    return f"{total // 3600}:{total // 60 % 60:02d}:{total % 60:02d}"
