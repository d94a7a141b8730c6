"""Write shards of a teacher that is still training, and publish them with its checkpoints.

A shard becomes valid when a checkpoint contains the steps that produced it. So a shard is finished
under a hidden name (`stage`), the checkpoint is written, and then the shard gets its name
(`publish`). The next start reconciles what a kill has left between the two: shards of steps before
the checkpoint are published, later ones are dropped, because these steps will run again. A visible
shard is never removed.
"""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from megatron_kd.cache.identity import CacheError, CacheIdentity, WrongCache
from megatron_kd.cache.shard import ShardInfo, ShardWriter, info_bytes, parse_info
from megatron_kd.cache.writer import check_sample, lock_writer, make_record
from megatron_kd.storage.atomic_files import sync_path, write_atomically
from megatron_kd.targets.sample_keys import sample_key
from megatron_kd.targets.sparse import SparseTarget

READY = ".ready"


class StagedWriter:
    """Write the samples of rising steps into shards that are hidden until `publish`.

    A shard holds whole steps, `shard_steps` of them unless `stage` comes first; its name and
    content follow from its first step and the worker alone. A sample that repeats within a shard is
    stored once, as it came first, and one whose target is not a number (its step did not reach the
    weights) is not stored.

    Args:
        directory: holds this identity, see `identity.write_identity`.
        identity: of the cache.
        worker: number of this writer; concurrent writers have different numbers.
        shard_steps: steps per shard.

    Raises:
        CacheInUse: another process, which the message names, writes as this worker.
        OSError: the disk is full, or not writable.
    """

    def __init__(
        self, directory: Path, identity: CacheIdentity, *, worker: int, shard_steps: int
    ) -> None:
        self.directory, self.identity = directory, identity
        self._worker, self._shard_steps = worker, shard_steps
        self._lock = lock_writer(directory / f".writer-{worker:05d}.lock")
        self._open: ShardWriter | None = None
        self._steps: list[int] = []
        self._keys: set[bytes] = set()
        self._staged: list[str] = []
        self._uncommitted = True

    def add(self, step: int, tokens: Tensor, target: SparseTarget) -> None:
        """Add one sample.

        Args:
            step: the training step.
            tokens: int [S], on the CPU.
            target: [S, K], on the CPU.

        Raises:
            ValueError: the sample does not fit the identity.
        """
        if step not in self._steps:
            if len(self._steps) == self._shard_steps:
                self._finish()
            self._steps.append(step)
        check_sample(tokens, target, self.identity)
        key = sample_key(tokens)
        if key in self._keys or bool(target.logprobs.isnan().any()):
            return
        record = make_record(key, target, self.identity)
        if self._open is None:
            name = f"step-{self._steps[0]:08d}-worker-{self._worker:05d}"
            self._open = ShardWriter(self.directory, name, self.identity, step=self._steps[0])
        self._open.add(record)
        self._keys.add(key)

    def _finish(self) -> None:
        """Close the open shard under its hidden name; the file beside it marks it as complete."""
        if self._open is not None:
            writer, path = self._open, self.directory / f".{self._open.name}"
            info = writer.finish(last_step=self._steps[-1])
            os.replace(writer.temporary, f"{path}.arrow{READY}")
            self._open = None
            write_atomically(f"{path}.json{READY}", info_bytes(info))
            self._staged.append(writer.name)
        self._steps.clear()
        self._keys.clear()

    def stage(self) -> None:
        """Make everything that was added durable. Call it before the checkpoint is written.

        Later samples begin a new shard.
        """
        self._finish()
        self._uncommitted = False

    def publish(self) -> None:
        """Give staged shards their names. Call it once the checkpoint is committed."""
        while self._staged:
            _publish(self.directory, self._staged[0])
            self._staged.pop(0)
        self._uncommitted = True

    def close(self) -> None:
        """Release the lock and drop what no checkpoint can hold.

        Staged shards that a checkpoint may hold are left to `reconcile`.
        """
        if self._open is not None:
            self._open.discard()
            self._open = None
        if self._uncommitted:
            for name in self._staged:
                _drop(self.directory, name)
        self._staged.clear()
        self._lock.release()


def reconcile(directory: Path, step: int) -> None:
    """Publish or drop the hidden shards of a killed job, now that training resumes at `step`.

    One process does so for all workers, while it holds a worker's lock and before the others take
    theirs.

    Raises:
        WrongCache: the cache already shows steps that will run again. CorruptCache, OSError: a file
            cannot be read.
    """
    for path in sorted(directory.glob(f".step-*.json{READY}")):
        info = parse_info(
            path.read_bytes(), str(directory / path.name.removeprefix(".").removesuffix(READY))
        )
        name = info.file.removesuffix(".arrow")
        if _last(info) < step:
            _publish(directory, name)
        else:
            _drop(directory, name)
    for leftover in directory.iterdir():
        # Two dots: the temporary name of a hidden file.
        if leftover.name.startswith((".step-", "..step-")):
            leftover.unlink(missing_ok=True)
    later_shards = [info for info in _published(directory) if _last(info) >= step]
    if later_shards:
        raise WrongCache(
            f"{directory} already holds targets of training steps up to "
            f"{max(map(_last, later_shards))}, but training goes on at step {step} "
            "and would make them again: choose another directory, or remove its files step-*, "
            f"from step {min(map(_first, later_shards))} on"
        )


def _published(directory: Path) -> list[ShardInfo]:
    return [
        parse_info(path.read_bytes(), str(path)) for path in sorted(directory.glob("step-*.json"))
    ]


def _first(info: ShardInfo) -> int:
    if info.step is None:
        raise CacheError(f"{info.file} has no training step")
    return info.step


def _last(info: ShardInfo) -> int:
    return _first(info) if info.last_step is None else info.last_step


def _publish(directory: Path, name: str) -> None:
    """Give a staged shard its name, also where an earlier attempt was interrupted."""
    hidden = directory / f".{name}.arrow{READY}"
    if hidden.exists():
        os.replace(hidden, directory / f"{name}.arrow")
        sync_path(directory)
    os.replace(directory / f".{name}.json{READY}", directory / f"{name}.json")
    sync_path(directory)


def _drop(directory: Path, name: str) -> None:
    for ending in (".json", ".arrow"):
        (directory / f".{name}{ending}{READY}").unlink(missing_ok=True)
