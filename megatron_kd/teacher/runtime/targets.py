"""Turn a teacher's final hidden states into targets, as [distill] asks for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_kd.cache import CacheIdentity
from megatron_kd.config import RunConfig
from megatron_kd.targets import (
    DenseTarget,
    SampleSelection,
    Selection,
    SparseTarget,
    Target,
    TopSelection,
    linear_targets,
)
from megatron_kd.teacher.source import TeacherInputs

if TYPE_CHECKING:
    from megatron_kd.parallel.groups import Groups


class TargetMaker:
    """Base class for turning final hidden states of a microbatch into a target."""

    def __call__(self, hidden: Tensor, weight: Tensor, token_keys: Tensor) -> Target:
        """Return the target of one microbatch.

        Args:
            hidden: [S, B, H], this rank's slice of S under sequence parallelism.
            weight: [V/tp, H], the output weight's vocabulary rows of this rank.
            token_keys: int64 [S, B], seeds of each token's random sample.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class SelectTargets(TargetMaker):
    """Select sparse targets [S, B, K]."""

    selection: Selection
    groups: Groups
    vocab_size: int
    sequence_parallel: bool
    chunk_tokens: int | None

    def __call__(self, hidden: Tensor, weight: Tensor, token_keys: Tensor) -> SparseTarget:
        """See TargetMaker."""
        return linear_targets(
            hidden,
            weight,
            self.selection,
            vocab_size=self.vocab_size,
            tp_group=self.groups.tp,
            sequence_parallel=self.sequence_parallel,
            chunk_tokens=self.chunk_tokens,
            row_keys=token_keys,
        )


class KeepHidden(TargetMaker):
    """Keep the hidden states, which the student's head multiplies chunk by chunk."""

    def __call__(self, hidden: Tensor, weight: Tensor, token_keys: Tensor) -> DenseTarget:
        """See TargetMaker."""
        return DenseTarget(hidden.detach(), weight.detach())


def configured_selection(config: RunConfig) -> Selection:
    """Return how [distill] chooses sparse targets."""
    distill = config.distill
    if distill.num_draws is not None:
        return SampleSelection(
            distill.num_draws,
            config.train.seed,
            distill.temperature,
            distill.draws,
            distill.draw_power,
        )
    # If no part of a target depends on the temperature, use 1: one cache then serves every one.
    depends = distill.top_p < 1.0 or distill.loss_tail != "renormalize"
    temperature = distill.temperature if depends and distill.truncate == "tempered" else 1.0
    return TopSelection(distill.top_k, distill.top_p, distill.min_k, temperature)


def configured_maker(config: RunConfig, inputs: TeacherInputs, groups: Groups) -> TargetMaker:
    """Return the TargetMaker that [distill] configures, for a teacher on `groups`."""
    if config.distill.dense:
        return KeepHidden()
    return SelectTargets(
        configured_selection(config),
        groups,
        inputs.vocab_size,
        config.parallel.sequence_parallel,
        config.distill.chunk_tokens,
    )


def cache_identity(
    config: RunConfig, inputs: TeacherInputs, *, teacher: str, value_encoding: str
) -> CacheIdentity:
    """Return the identity of a cache that serves this run.

    Args:
        config: the run.
        inputs: its checked teacher.
        teacher: digest of the teacher's files.
        value_encoding: how the cache stores log-probabilities.
    """
    return CacheIdentity(
        teacher=teacher,
        tokenizer=inputs.tokenizer_digest,
        vocab_size=inputs.vocab_size,
        sequence_length=config.batch.sequence_length,
        selection=configured_selection(config),
        value_encoding=value_encoding,
        teacher_step=inputs.info.step if inputs.info is not None else None,
        document_attention=config.data.document_attention,
    )
