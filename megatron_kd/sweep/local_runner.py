"""A sweep on this machine: what is ready is started, so many at a time, in the order of the file."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from megatron_kd.sweep.grid import Sweep, Task
from megatron_kd.sweep.task_runner import Outcome, Shop, needs_of
from megatron_kd.sweep.task_state import Found, State, look

_ASK = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def run_tasks(
    sweep: Sweep, tasks: Mapping[str, Task], shop: Shop, *, workers: int, say: Callable[[str], None]
) -> dict[str, Outcome]:
    """Do what is not done, `workers` at a time; what becomes of each that was not done before.

    The first signal lets runs save and leave and waits for them; the second ends them at once. Must be called in the main thread.
    """
    found = look(sweep, tasks)
    for name, task in tasks.items():
        if found[name].state is State.DONE:
            shop.folder.settle(task)
    open_tasks = {name: task for name, task in tasks.items() if found[name].state is not State.DONE}
    say(f"{len(tasks)} tasks, {len(tasks) - len(open_tasks)} done before, {workers} at a time")
    asked: list[int] = []
    previous = {
        number: signal.signal(number, lambda received, _frame: asked.append(received))
        for number in _ASK
    }
    try:
        return _Run(open_tasks, found, shop, workers, say, asked).work()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Run:
    """The state of one `run_tasks`."""

    def __init__(
        self,
        waiting: dict[str, Task],
        found: dict[str, Found],
        shop: Shop,
        workers: int,
        say: Callable[[str], None],
        asked: list[int],
    ) -> None:
        self._waiting, self._found, self._shop, self._workers, self._say = (
            waiting,
            found,
            shop,
            workers,
            say,
        )
        self._asked, self._heeded = asked, 0
        self._running: dict[Future[Outcome], str] = {}
        self._outcomes: dict[str, Outcome] = {}
        self._total, self._began = len(waiting), time.monotonic()

    def work(self) -> dict[str, Outcome]:
        with ThreadPoolExecutor(self._workers) as pool:
            while True:
                self._heed()
                self._block()
                if not self._shop.stopping:
                    self._start(pool)
                if not self._running:
                    break
                # Short, because a signal is heeded between two waits.
                for future in wait(self._running, timeout=0.2, return_when=FIRST_COMPLETED).done:
                    self._ended(self._running.pop(future), future.result())
        for name in self._waiting:
            self._outcomes[name] = Outcome("left", "not begun")
        return self._outcomes

    def _heed(self) -> None:
        while self._heeded < len(self._asked):
            number = self._asked[self._heeded]
            self._heeded += 1
            first = self._heeded == 1
            name = signal.Signals(number).name
            self._say(
                f"{name}: waiting for {len(self._running)} to save and leave"
                if first
                else f"{name} again: ending them"
            )
            self._shop.stop(signal.SIGTERM if first else signal.SIGKILL)

    def _block(self) -> None:
        """What needs something that failed is not started."""
        for name, task in list(self._waiting.items()):
            bad = [
                need
                for need in task.needs
                if need in self._outcomes
                and self._outcomes[need].word in ("failed", "stopped", "blocked")
            ]
            if bad:
                del self._waiting[name]
                self._outcomes[name] = Outcome("blocked", f"needs {bad[0]!r}")

    def _start(self, pool: ThreadPoolExecutor) -> None:
        for name, task in list(self._waiting.items()):
            if len(self._running) >= self._workers:
                return
            if all(self._found[need].state is State.DONE for need in task.needs):
                del self._waiting[name]
                self._running[
                    pool.submit(self._shop.perform, task, needs_of(task, self._found))
                ] = name

    def _ended(self, name: str, outcome: Outcome) -> None:
        self._outcomes[name] = outcome
        if outcome.word == "done":
            self._found[name] = Found(State.DONE, id=outcome.id)
        done = sum(each.word == "done" for each in self._outcomes.values())
        passed = time.monotonic() - self._began
        words = (
            f"{outcome.word} in {clock(outcome.seconds)}"
            if outcome.word == "done"
            else f"{outcome.word}: {outcome.message}"
        )
        left = self._total - len(self._outcomes)
        rate = (
            f"  {done / passed * 60:.2g} a minute, ETA {clock(passed / done * left)}"
            if done and left
            else ""
        )
        self._say(f"[{len(self._outcomes)}/{self._total}] {name}: {words}{rate}")


def clock(seconds: float) -> str:
    """1:02:03."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def print_line(line: str) -> None:
    """To stderr, at once."""
    print(f"sweep: {line}", file=sys.stderr, flush=True)
