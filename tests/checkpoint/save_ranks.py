"""Save on two ranks with several Savers. Spawned ranks import this module."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_kd.config import RunConfig


def error_message(action: Callable[[], Any]) -> str:
    """Return the message of a CheckpointError, or an empty string."""
    from megatron_kd.checkpoint.store import CheckpointError

    try:
        action()
    except CheckpointError as error:
        return str(error)
    return ""


@contextmanager
def changed_write(change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace StateWriter.write by `change` of it."""
    from megatron_kd.checkpoint.distributed_writer import StateWriter

    real = StateWriter.write
    StateWriter.write = change(real)  # type: ignore[method-assign]
    try:
        yield
    finally:
        StateWriter.write = real  # type: ignore[method-assign]


class Bench:
    """Save the state of one run with several Savers.

    Attributes:
        results: messages that this rank received, and the visible steps meanwhile.
    """

    def __init__(self, rendezvous: str, config: RunConfig, folder: Path) -> None:
        import torch.distributed as dist

        from megatron_kd.train.build import build_run

        self.run, self.folder, self.results = (
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

    def save(self, saver: Any) -> None:
        object.__setattr__(self.run, "saver", saver)
        self.run.save()

    def steps(self, saver: Any) -> list[int]:
        from megatron_kd.checkpoint.store import complete_steps

        return complete_steps(saver.checkpoints)

    def save_while_a_rank_waits(self, later: Any) -> None:
        """Delay the last rank's writing while three steps run.

        The next save then waits for the one before.
        """
        gate, results = threading.Event(), self.results

        def wait_at_gate(real: Callable[..., Any]) -> Callable[..., Any]:
            return lambda writer, report_phase: (
                gate.wait(60) if self.rank else None,
                real(writer, report_phase),
            )[1]

        with changed_write(wait_at_gate):
            self.save(later)
            results["seen"] = []
            for _ in range(3):
                self.train(1)
                later.poll()
                results["seen"].append(self.steps(later))
            gate.set()
            later.finish()
        results["then"] = self.steps(later)
        self.save(later)
        results["before the next"] = self.steps(later)
        self.train(1)
        self.save(later)
        results["at the next"] = self.steps(later)
        later.finish()
        results["at the end"] = self.steps(later)

    def failures(self, waiting: Any, later: Any) -> None:
        """Let the last rank's writing fail, and lose the lock."""
        results = self.results

        def failing(real: Callable[..., Any]) -> Callable[..., Any]:
            def write(writer: Any, report_phase: Any) -> Any:
                results = real(writer, report_phase)
                if self.rank:
                    raise OSError(
                        errno.ENOSPC, os.strerror(errno.ENOSPC), str(writer.folder / "part")
                    )
                return results

            return write

        with changed_write(failing):
            results["full"] = error_message(lambda: self.save(waiting))
            results["full later"] = error_message(lambda: (self.save(later), later.finish()))
        never = threading.Event()
        with changed_write(
            lambda real: (
                lambda writer, report_phase: (
                    report_phase("writing part"),
                    never.wait(20) if self.rank else None,
                    real(writer, report_phase),
                )[2]
            )
        ):
            results["slow"] = error_message(
                lambda: self.save(self.saver("waiting", asynchronous=False, timeout_seconds=0.5))
            )
        never.set()
        later.check = lambda: (_ for _ in ()).throw(_lost())
        results["lost"] = error_message(lambda: self.save(later))


def in_two_ranks(rendezvous: str, config: RunConfig, folder: Path) -> dict[str, Any]:
    """Save one run into several folders; see `Bench`."""
    from megatron_kd.parallel.groups import stop_groups

    bench = Bench(rendezvous, config, folder)
    with bench.run.groups.watchdog:
        bench.save(waiting := bench.saver("waiting", asynchronous=False))
        waiting.finish()
        bench.save_while_a_rank_waits(later := bench.saver("later", asynchronous=True))
        bench.failures(waiting, later)
    stop_groups()
    return bench.results


def _lost() -> Exception:
    from megatron_kd.storage.directory_lock import LostLockError

    return LostLockError("run.directory was taken over by somebody")
