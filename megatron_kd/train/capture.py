"""Store the targets of a teacher that is still training, from its own forward passes.

A step's targets are those of the weights before its update, which checkpoint step-n holds for step
n. They are selected from the hidden states on their way into the loss. The training does not
change: no random number is drawn, and nothing is written to.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

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
from megatron_kd.targets.sample_keys import token_keys
from megatron_kd.teacher.runtime.targets import SelectTargets, configured_selection
from megatron_kd.train.startup.input_checks import Inputs
from megatron_kd.train.startup.weights_fingerprint import RunDescription, describe_run, record_run


class CaptureError(RuntimeError):
    """Report that targets could not be written. Checkpoints and cache still agree."""


class Capture:
    """Base class of observers of a run's forward passes.

    Every method is called on every rank alike, but `add` on the last stage only.
    """

    def begin_step(self, step: int) -> None:
        """Begin the training step with this number. No collective."""
        raise NotImplementedError

    def add(self, hidden: Tensor, weight: Tensor, microbatch: Microbatch) -> None:
        """Take what goes into the loss of one microbatch.

        Args:
            hidden: [S, B, H], this rank's slice of S under sequence parallelism.
            weight: [V/tp, H], the output weight.
            microbatch: its data.

        Collectives:
            May be collective over the tensor-parallel group.
        """
        raise NotImplementedError

    def end_step(self) -> None:
        """End the step, after all its microbatches.

        Raises:
            CaptureError: on every rank, if any rank cannot write.

        Collectives:
            One small all-reduce, in steps that are captured.
        """
        raise NotImplementedError

    def stage(self) -> None:
        """Prepare for a checkpoint that is about to be written.

        Collective over the world; raises CaptureError as `end_step`.
        """
        raise NotImplementedError

    def publish(self) -> None:
        """Show the samples up to the checkpoint that has been committed.

        Collective over the world; raises CaptureError as `end_step`.
        """
        raise NotImplementedError

    def close(self) -> None:
        """End the run, also after a failure. No collective."""
        raise NotImplementedError


class NoCapture(Capture):
    """Store nothing."""

    def begin_step(self, step: int) -> None:
        """See Capture."""

    def add(self, hidden: Tensor, weight: Tensor, microbatch: Microbatch) -> None:
        """See Capture."""

    def end_step(self) -> None:
        """See Capture."""

    def stage(self) -> None:
        """See Capture."""

    def publish(self) -> None:
        """See Capture."""

    def close(self) -> None:
        """See Capture."""


class LiveCapture(Capture):
    """Select targets on the ranks of the last stage and write them from one rank of each replica.

    The product with the output weight is its own, in chunks: each captured microbatch costs one
    more forward pass of the head.

    Args:
        groups: of the run.
        steps: which steps are captured.
        select: makes the targets.
        writer: of this replica; None on ranks that do not write.
    """

    def __init__(
        self, groups: Groups, steps: range, select: SelectTargets, writer: BackgroundWriter | None
    ) -> None:
        self._groups, self._steps, self._select, self._writer = groups, steps, select, writer
        self._step = -1

    def begin_step(self, step: int) -> None:
        """See Capture."""
        self._step = step

    @torch.no_grad()
    def add(self, hidden: Tensor, weight: Tensor, microbatch: Microbatch) -> None:
        """See Capture."""
        if self._step not in self._steps:
            return
        keys = token_keys(microbatch.sample_keys, microbatch.tokens.shape[1])
        target = self._select(hidden.detach(), weight.detach(), keys)
        if self._writer is not None:
            self._writer.put(self._step, microbatch.marked_tokens, target)

    def end_step(self) -> None:
        """See Capture."""
        if self._step not in self._steps:
            return
        failed = self._writer is not None and self._writer.failed
        if on_any_rank(failed, self._groups.platform.device):
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
        message = None
        if problem is not None:
            message = (
                f"targets cannot be written to capture.directory: {problem}: those up to the last "
                "checkpoint are kept; make room and start again"
            )
        raise_together(message, CaptureError)


def build_capture(config: RunConfig, inputs: Inputs, groups: Groups, *, step: int) -> Capture:
    """Build the capture that [capture] configures.

    Args:
        config: the run.
        inputs: its checked inputs.
        groups: of the run.
        step: at which the run starts or goes on.

    Raises:
        ConfigError: on every rank, if the directory holds something else, is in use or not
            writable, or has no room.

    Collectives:
        Over the world.
    """
    section, directory = config.capture, config.capture.directory
    if directory is None:
        return NoCapture()
    run = describe_run(config, inputs, directory)
    identity = _identity(config, inputs, run)
    steps = section.steps(config.train.steps)
    samples = config.batch.global_batch_size // groups.data_size
    shard_steps = max(1, section.shard_samples // samples)
    remaining = len(steps) - len(range(steps.start, min(step, steps.stop), steps.step))
    shard_bytes = _shard_bytes(config, remaining, shard_steps, samples)

    def begin() -> StagedWriter:
        record_run(directory, run)
        write_identity(directory, identity)
        writer = StagedWriter(directory, identity, worker=groups.data_rank, shard_steps=shard_steps)
        # The first replica's lock guards what a killed job has left until it is reconciled.
        if groups.data_rank == 0:
            reconcile(directory, step)
        _check_room(directory, shard_bytes * groups.data_size)
        return writer

    writer = _begin_in_order(begin, groups)
    background = None
    if writer is not None:
        background = BackgroundWriter(writer, max_bytes=section.queue_mib << 20)
    return LiveCapture(groups, steps, _selector(config, inputs, groups), background)


def _identity(config: RunConfig, inputs: Inputs, run: RunDescription) -> CacheIdentity:
    return CacheIdentity(
        teacher=run.digest,
        tokenizer=inputs.digest,
        vocab_size=inputs.vocab_size,
        sequence_length=config.batch.sequence_length,
        selection=configured_selection(config),
        value_encoding=config.capture.value_encoding,
        document_attention=config.data.document_attention,
    )


def _selector(config: RunConfig, inputs: Inputs, groups: Groups) -> SelectTargets:
    return SelectTargets(
        configured_selection(config),
        groups,
        inputs.vocab_size,
        config.parallel.sequence_parallel,
        config.distill.chunk_tokens,
    )


def _shard_bytes(config: RunConfig, remaining_steps: int, shard_steps: int, samples: int) -> int:
    """Return the size in memory of one replica's shard.

    Args:
        config: the run.
        remaining_steps: steps that are still to be captured.
        shard_steps: captured steps of a full shard.
        samples: of one replica in a step.
    """
    tokens = min(shard_steps, remaining_steps) * samples * config.batch.sequence_length
    return tokens * config.target_bytes_per_token


def _begin_in_order(begin: Callable[[], StagedWriter], groups: Groups) -> StagedWriter | None:
    """Call `begin` on the ranks that write, the first replica's before the others'.

    Returns:
        The writer; None on ranks that do not write.

    Raises:
        ConfigError: on every rank, if any cannot begin.

    Collectives:
        Two over the world.
    """
    writer, problem = None, None
    for first in (True, False):
        if groups.reports_loss and (groups.data_rank == 0) == first:
            try:
                writer = begin()
            except (CacheError, ConfigError) as error:
                problem = f"capture.directory: {error}"
            except OSError as error:
                problem = (
                    f"capture.directory cannot be written ({error}): choose another directory, or "
                    "free space"
                )
        raise_together(problem, ConfigError)
    return writer


def _check_room(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ConfigError(
            f"{directory} has {free >> 20} MiB free, but a shard of each data-parallel rank may "
            f"need {-(-needed >> 20)} MiB together: free space, or set a smaller "
            "capture.shard_samples"
        )
