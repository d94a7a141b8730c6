"""What two ranks do with one Saver after the other. A module of its own, because spawned ranks import it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_kd.config import RunConfig


def told(action: Callable[[], Any]) -> str:
    """What a CheckpointError said, "" where there was none."""
    from megatron_kd.checkpoint.store import CheckpointError

    try:
        action()
    except CheckpointError as error:
        return str(error)
    return ""


@contextmanager
def changed_write(change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """StateWriter.write as `change` makes it."""
    from megatron_kd.checkpoint.distributed_writer import StateWriter

    real = StateWriter.write
    StateWriter.write = change(real)  # type: ignore[method-assign]
    try:
        yield
    finally:
        StateWriter.write = real  # type: ignore[method-assign]


class Bench:
    """One run whose state is saved by several Savers; `found`: what this rank was told, and what could be seen meanwhile."""

    def __init__(self, rendezvous: str, config: RunConfig, folder: Path) -> None:
        import torch.distributed as dist

        from megatron_kd.train.build import build_run

        self.run, self.folder, self.found = (
            build_run(config, rendezvous=rendezvous),
            folder,
            dict[str, Any](),
        )
        self.rank = dist.get_rank()
        self.train(2)

    def train(self, steps: int) -> None:
        from megatron_kd.train.step import train_step

        for _ in range(steps):
            train_step(self.run)

    def saver(self, name: str, *, asynchronous: bool, timeout_seconds: float = 60.0) -> Any:
        from megatron_kd.checkpoint.saver import Saver

        changes = {"asynchronous": asynchronous, "timeout_seconds": timeout_seconds}
        section, groups = self.run.config.checkpoint.model_copy(update=changes), self.run.groups
        return Saver(
            self.folder / name / "checkpoints",
            section,
            device=groups.platform.device,
            watchdog=groups.watchdog,
        )

    def save(self, to: Any) -> None:
        object.__setattr__(self.run, "saver", to)
        self.run.save()

    def steps(self, saver: Any) -> list[int]:
        from megatron_kd.checkpoint.store import complete_steps

        return complete_steps(saver.checkpoints)

    def held_up(self, later: Any) -> None:
        """On the last rank alone, while three steps are taken; then the next save waits for the one before."""
        gate, found = threading.Event(), self.found

        def held(real: Callable[..., Any]) -> Callable[..., Any]:
            return lambda writer, say: (gate.wait(60) if self.rank else None, real(writer, say))[1]

        with changed_write(held):
            self.save(later)
            found["seen"] = []
            for _ in range(3):
                self.train(1)
                later.poll()
                found["seen"].append(self.steps(later))
            gate.set()
            later.finish()
        found["then"] = self.steps(later)
        self.save(later)
        found["before the next"] = self.steps(later)
        self.train(1)
        self.save(later)
        found["at the next"] = self.steps(later)
        later.finish()
        found["at the end"] = self.steps(later)

    def failures(self, waiting: Any, later: Any) -> None:
        """Of the last rank, and of the lease."""
        found = self.found

        def failing(real: Callable[..., Any]) -> Callable[..., Any]:
            def write(writer: Any, say: Any) -> Any:
                results = real(writer, say)
                if self.rank:
                    raise OSError(
                        errno.ENOSPC, os.strerror(errno.ENOSPC), str(writer.folder / "part")
                    )
                return results

            return write

        with changed_write(failing):
            found["full"] = told(lambda: self.save(waiting))
            found["full later"] = told(lambda: (self.save(later), later.finish()))
        never = threading.Event()
        with changed_write(
            lambda real: (
                lambda writer, say: (
                    say("writing part"),
                    never.wait(20) if self.rank else None,
                    real(writer, say),
                )[2]
            )
        ):
            found["slow"] = told(
                lambda: self.save(self.saver("waiting", asynchronous=False, timeout_seconds=0.5))
            )
        never.set()
        later.check = lambda: (_ for _ in ()).throw(_lost())
        found["lost"] = told(lambda: self.save(later))


def in_two_ranks(rendezvous: str, config: RunConfig, folder: Path) -> dict[str, Any]:
    """Saves of one run into several folders; see `Bench`."""
    from megatron_kd.parallel.groups import stop_groups

    bench = Bench(rendezvous, config, folder)
    with bench.run.groups.watchdog:
        bench.save(waiting := bench.saver("waiting", asynchronous=False))
        waiting.finish()
        bench.held_up(later := bench.saver("later", asynchronous=True))
        bench.failures(waiting, later)
    stop_groups()
    return bench.found


def _lost() -> Exception:
    from megatron_kd.storage.directory_lock import LostLockError

    return LostLockError("run.directory was taken over by somebody")
