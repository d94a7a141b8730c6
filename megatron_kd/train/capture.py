"""A teacher that is still training: sparse targets from the forward passes it trains with, written beside the training.

A step's targets are those of the weights before its update, which checkpoint step-n holds for step n. They are taken from the
hidden states on their way into the loss and change nothing of the training: no random number is drawn, nothing is written to.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_kd.cache import CacheError, CacheIdentity
from megatron_kd.cache.background_writer import BackgroundWriter
from megatron_kd.cache.identity import write_identity
from megatron_kd.cache.staged import StagedWriter, reconcile
from megatron_kd.config import ConfigError, RunConfig
from megatron_kd.data.batches import Microbatch
from megatron_kd.parallel.collectives import on_any_rank, raise_together
from megatron_kd.parallel.groups import Groups
from megatron_kd.targets.keys import token_keys
from megatron_kd.targets.sparse import SparseTarget
from megatron_kd.teacher.build import selection_of
from megatron_kd.teacher.online import SelectTargets
from megatron_kd.train.startup.input_checks import Inputs
from megatron_kd.train.startup.weights_fingerprint import describe_run, record_run

# (hidden [S, B, H], weight [V/tp, H], microbatch): shown what goes into the loss of one microbatch, on the last stage.
Observe = Callable[[Tensor, Tensor, Microbatch], None]


class CaptureError(RuntimeError):
    """Targets could not be written. The checkpoints and what the cache shows stay in step with each other."""


def nothing(hidden: Tensor, weight: Tensor, microbatch: Microbatch) -> None:
    """Look away."""


class Capture(Protocol):
    """What a run does with the forward passes it trains with. Every method is called on every rank alike."""

    def observer(self, step: int) -> Observe:
        """What the microbatches of `step` are shown to. No collective, but what it returns may be one over the tensor group."""

    def end_step(self) -> None:
        """All microbatches of the step were shown. CaptureError on every rank where any cannot write; one small all-reduce."""

    def stage(self) -> None:
        """A checkpoint is about to be written. Collective over the world; CaptureError as in `end_step`."""

    def publish(self) -> None:
        """The checkpoint is committed. Collective over the world; CaptureError as in `end_step`."""

    def close(self) -> None:
        """The run ends here, whether well or not. No collective."""


class NoCapture:
    """Nothing is captured."""

    def observer(self, step: int) -> Observe:
        """See Capture."""
        return nothing

    def end_step(self) -> None:
        """See Capture."""

    stage = publish = close = end_step


class LiveCapture:
    """Selects targets on the ranks of the last stage and hands them to `writer`, which one rank of each replica has.

    Its own product with the output weight, in chunks: a forward pass of the head more for each captured microbatch.
    """

    def __init__(
        self, groups: Groups, steps: range, select: SelectTargets, writer: BackgroundWriter | None
    ) -> None:
        self._groups, self._steps, self._select, self._writer = groups, steps, select, writer
        self._captured = False

    def observer(self, step: int) -> Observe:
        """See Capture."""
        self._captured = step in self._steps
        return partial(self._take, step) if self._captured else nothing

    @torch.no_grad()
    def _take(self, step: int, hidden: Tensor, weight: Tensor, microbatch: Microbatch) -> None:
        keys = token_keys(microbatch.sample_keys, microbatch.tokens.shape[1])
        target: SparseTarget = self._select(hidden.detach(), weight.detach(), keys)
        if self._writer is not None:
            self._writer.put(step, microbatch.named, target)

    def end_step(self) -> None:
        """See Capture."""
        failed = self._writer is not None and self._writer.failed
        if self._captured and on_any_rank(failed, self._groups.platform.device):
            self._raise_together()

    def stage(self) -> None:
        """See Capture."""
        if self._writer is not None:
            self._writer.stage()
        self._raise_together()

    def publish(self) -> None:
        """See Capture."""
        if self._writer is not None:
            self._writer.publish()
        self._raise_together()

    def close(self) -> None:
        """See Capture."""
        if self._writer is not None:
            self._writer.close()

    def _raise_together(self) -> None:
        problem = None if self._writer is None else self._writer.problem
        told = None if problem is None else (
            f"targets cannot be written to capture.directory: {problem}: those up to the last checkpoint are kept; make room and "
            "start again"
        )  # fmt: skip
        raise_together(told, CaptureError)


def build_capture(config: RunConfig, inputs: Inputs, groups: Groups, *, step: int) -> Capture:
    """What [capture] asks for, for a run that goes on at `step`. Collective over the world.

    ConfigError on every rank where the directory holds something else, is in use or not writable, or has no room.
    """
    section, directory = config.capture, config.capture.directory
    if directory is None:
        return NoCapture()
    run = describe_run(config, inputs, directory)
    selection = selection_of(config)
    identity = CacheIdentity(
        teacher=run.digest,
        tokenizer=inputs.digest,
        vocab_size=inputs.vocab_size,
        sequence_length=config.batch.sequence_length,
        selection=selection,
        value_encoding=section.value_encoding,
        document_attention=config.data.document_attention,
    )
    steps = section.steps(config.train.steps)
    to_come = len(steps) - len(range(steps.start, min(step, steps.stop), steps.step))
    samples = config.batch.global_batch_size // groups.data_size
    shard_steps = max(1, section.shard_samples // samples)
    shard_tokens = min(shard_steps, to_come) * samples * config.batch.sequence_length

    def begin() -> StagedWriter:
        record_run(directory, run)
        return _begin(
            directory,
            identity,
            groups,
            shard_steps,
            step,
            shard_tokens * config.target_bytes_per_token,
        )

    writer = _each_writer(begin, groups)
    select = SelectTargets(
        selection,
        groups,
        inputs.vocab_size,
        config.parallel.sequence_parallel,
        config.distill.chunk_tokens,
    )
    background = (
        None if writer is None else BackgroundWriter(writer, max_bytes=section.queue_mib << 20)
    )
    return LiveCapture(groups, steps, select, background)


def _each_writer(begin: Callable[[], StagedWriter], groups: Groups) -> StagedWriter | None:
    """`begin()` on the ranks that write, the first replica's before the others'; None elsewhere. Collective over the world."""
    writer, problem = None, None
    for first in (True, False):
        if groups.reports_loss and (groups.data_rank == 0) == first:
            try:
                writer = begin()
            except (CacheError, ConfigError) as error:
                problem = f"capture.directory: {error}"
            except OSError as error:
                problem = f"capture.directory cannot be written ({error}): choose another directory, or free space"
        raise_together(problem, ConfigError)
    return writer


def _begin(
    directory: Path,
    identity: CacheIdentity,
    groups: Groups,
    shard_steps: int,
    step: int,
    shard_bytes: int,
) -> StagedWriter:
    """The writer of this replica; the first one's lock guards the settling of what a killed job has left."""
    write_identity(directory, identity)
    writer = StagedWriter(directory, identity, worker=groups.data_rank, shard_steps=shard_steps)
    if groups.data_rank == 0:
        reconcile(directory, step)
    _check_room(directory, shard_bytes * groups.data_size)
    return writer


def _check_room(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ConfigError(
            f"{directory} has {free >> 20} MiB free, but a shard of each data-parallel rank may need {-(-needed >> 20)} MiB together: "
            "free space, or set a smaller capture.shard_samples"
        )
