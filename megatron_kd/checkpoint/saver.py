"""Save checkpoints: planned by all ranks together, written by each, committed by the first.

A save has three parts. Planning is collective and delays the training. Writing is each rank's own,
in a thread, and needs no other rank. When all have written (an all-reduce of a number at a step
boundary informs all ranks in the same step), their results are gathered, and the first rank writes
the table of contents, the digests and the commit mark, and gives the folder its name. A kill at any
moment leaves the previous checkpoint as the newest. A synchronous save is the same with the waiting
done at once.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from torch.distributed.checkpoint.metadata import Metadata

from megatron_kd.checkpoint.background_job import DONE, FAILED, RUNNING, BackgroundJob
from megatron_kd.checkpoint.background_verify import CheckpointLog, Verifier
from megatron_kd.checkpoint.distributed_writer import PhaseReporter, StateWriter, plan_save
from megatron_kd.checkpoint.manifest import FileRecord, wait_for_sizes
from megatron_kd.checkpoint.sharded_state import OptimizerState, training_state
from megatron_kd.checkpoint.store import (
    CheckpointError,
    CheckpointInfo,
    PendingCheckpoint,
    complete_steps,
    remove_leftovers,
    step_folder,
)
from megatron_kd.config import CheckpointSection
from megatron_kd.parallel.collectives import (
    from_rank_zero,
    maximum,
    on_any_rank,
    raise_together,
    to_rank_zero,
)
from megatron_kd.parallel.watchdog import Watchdog
from megatron_kd.storage.directory_lock import LostLockError


@dataclass
class _Save:
    """Hold the state of a save in progress.

    Attributes:
        info: content of state.json.
        pending: the hidden folder.
        writer: this rank's writer.
        metadata: table of contents, on rank 0.
        job: writes this rank's files, later commits.
        begin: time of the start.
        stalled: seconds that the training has waited for the save.
        committing: whether `job` commits.
    """

    info: CheckpointInfo
    pending: PendingCheckpoint
    writer: StateWriter
    metadata: Metadata | None
    job: BackgroundJob
    begin: float
    stalled: float = 0.0
    committing: bool = False


class Saver:
    """Write the checkpoints of a run.

    Every method but the properties is collective over the world.

    Args:
        checkpoints: the folder of all of them.
        section: [checkpoint] of the run file.
        device: of the numbers that are reduced over all ranks.
        watch: receives this rank's current activity.

    Raises:
        CheckpointError: on every rank alike, where a file cannot be written, or takes longer than
            section.timeout_seconds. Earlier checkpoints are untouched.
    """

    def __init__(
        self,
        checkpoints: Path,
        section: CheckpointSection,
        *,
        device: torch.device,
        watchdog: Watchdog,
    ) -> None:
        self.checkpoints, self._section, self._device, self._watchdog = (
            checkpoints,
            section,
            device,
            watchdog,
        )
        self._first = dist.get_rank() == 0
        self.log = CheckpointLog(checkpoints.parent / "checkpoints.jsonl")
        self.verifier = Verifier(checkpoints, keep_last=section.keep_last, log=self.log)
        self.check: Callable[[], None] = lambda: None
        self._save: _Save | None = None
        self._clean = self._tight = False
        self._newest: int | None = None

    def save(
        self, info: CheckpointInfo, models: Sequence[GPTModel], optimizer: OptimizerState
    ) -> None:
        """Write a checkpoint; it is complete on return, or in progress where section.asynchronous.

        Args:
            info: content of state.json.
            models: this rank's model chunks.
            optimizer: their optimizer.
        """
        self._complete()
        begin = time.perf_counter()
        self._watchdog.enter_phase(
            "planning a checkpoint", limit_seconds=self._section.timeout_seconds
        )
        pending = PendingCheckpoint(self.checkpoints, info.step)
        try:
            from_rank_zero(lambda: self._make_folder(pending, info.step))
        except OSError as error:
            raise CheckpointError(
                self._failure_message(info.step, f"{error.filename}: {error.strerror}")
            ) from error
        except LostLockError as error:
            raise CheckpointError(self._failure_message(info.step, str(error))) from error
        writer, metadata = plan_save(
            training_state(models, optimizer), pending.folder, copy=self._section.asynchronous
        )
        self._save = _Save(info, pending, writer, metadata, self._start(writer.write), begin)
        self._save.stalled = time.perf_counter() - begin
        if not self._section.asynchronous:
            self._complete()

    def _make_folder(self, pending: PendingCheckpoint, step: int) -> None:
        self.check()
        self.clean()
        self._check_disk_space(step)
        pending.start()

    def clean(self) -> None:
        """Remove, once, the leftovers of killed saves.

        Only for rank 0, which has the run directory's lock.
        """
        if not self._clean and self.checkpoints.is_dir():
            remove_leftovers(self.checkpoints)
            self._clean = True

    def _check_disk_space(self, step: int) -> None:
        """Raise OSError where the disk has no room for a checkpoint of the previous one's size.

        Checked before anything is written. Only for rank 0.
        """
        steps = complete_steps(self.checkpoints)
        if not steps:
            return
        size = sum(
            path.stat().st_size for path in step_folder(self.checkpoints, steps[-1]).iterdir()
        )
        free = shutil.disk_usage(self.checkpoints).free
        if free < size:
            message = (
                f"a checkpoint takes {size / 1e9:.3g} GB and {free / 1e9:.3g} GB are free: make "
                "room"
            )
            raise OSError(errno.ENOSPC, message, str(self.checkpoints))
        if free < 2 * size and not self._tight:
            self.log.warn(
                "disk",
                step,
                f"{self.checkpoints}: {free / 1e9:.3g} GB are free: "
                "room for this checkpoint and no other",
            )
        self._tight = free < 2 * size

    def _start(self, work: Callable[[PhaseReporter], Any]) -> BackgroundJob:
        return BackgroundJob(
            work,
            limit_seconds=self._section.timeout_seconds,
            low_priority=self._section.asynchronous,
        )

    def poll(self) -> bool:
        """Advance the save in progress, and return whether there still is one.

        Collectives:
            One all-reduce of a number if a save is in progress.
        """
        save = self._save
        if save is None:
            return False
        begin = time.perf_counter()
        state = int(maximum(float(save.job.state), self._device))
        if state == FAILED:
            self._abort(save)
        if state == DONE and not save.committing:
            self._start_commit(save)
            state = RUNNING
        save.stalled += time.perf_counter() - begin
        if state == DONE:
            self._finish(save)
        return self._save is not None

    def _start_commit(self, save: _Save) -> None:
        written = to_rank_zero((save.job.result, save.writer.records))
        save.committing = True
        save.job = self._start(
            lambda report_phase: self._commit(save, written, report_phase) if self._first else None
        )

    def _commit(
        self,
        save: _Save,
        written: list[tuple[Any, dict[str, FileRecord]]],
        report_phase: PhaseReporter,
    ) -> dict[str, FileRecord]:
        report_phase("collecting what all ranks have written")
        self.check()
        files = {name: record for _, records in written for name, record in records.items()}
        wait_for_sizes(save.pending.folder, files)
        report_phase("writing .metadata")
        assert save.metadata is not None
        save.writer.finish(save.metadata, [results for results, _ in written])
        report_phase("writing the manifest")
        return save.pending.commit(save.info, {**files, **save.writer.records})

    def _finish(self, save: _Save) -> None:
        self._save, self._newest = None, save.info.step
        if self._first:
            size = sum(record.bytes for record in save.job.result.values())
            facts = {
                "seconds": round(time.perf_counter() - save.begin, 4),
                "stalled_seconds": round(save.stalled, 4),
                "bytes": size,
            }
            self.log.add("saved", save.info.step, **facts)
            self.verifier.add(save.info.step)

    def _abort(self, save: _Save) -> None:
        self._save = None
        problem = save.job.problem
        if self._first:
            save.pending.discard()
        raise_together(
            None if problem is None else self._failure_message(save.info.step, problem),
            CheckpointError,
        )

    def _failure_message(self, step: int, problem: str) -> str:
        steps = complete_steps(self.checkpoints)
        remaining = (
            f"the checkpoint of step {steps[-1]} is untouched"
            if steps
            else "there is no earlier one"
        )
        return (
            f"the checkpoint of step {step} could not be written: {problem}; {remaining}: "
            "check the disk, then start the same command again"
        )

    def _complete(self) -> None:
        """Wait for the save in progress."""
        pause = 0.001
        while (save := self._save) is not None:
            # Each poll is a short collective, so no rank waits in one for another rank's disk.
            self._watchdog.enter_phase("saving a checkpoint")
            if self.poll():
                time.sleep(pause)
                save.stalled += pause
                pause = min(2 * pause, 0.05)

    def finish(self, *, read_back: bool = True) -> None:
        """Wait until every save is complete, and with `read_back` until it has been verified.

        Raises:
            CheckpointError: the last checkpoint does not read back.
        """
        self._complete()
        if read_back:
            self._read_back()

    def _read_back(self) -> None:
        begin, pause, limit = time.monotonic(), 0.001, self._section.timeout_seconds
        while on_any_rank(
            self._first and self.verifier.busy and time.monotonic() - begin < limit, self._device
        ):
            self._watchdog.enter_phase("reading a checkpoint back")
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        problem = (
            self.verifier.damaged.get(self._newest)
            if self._first and self._newest is not None
            else None
        )
        raise_together(
            None if problem is None else f"the last checkpoint does not read back: {problem}",
            CheckpointError,
        )
