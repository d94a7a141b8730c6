"""Make this project's losses of the output head, for tools/bench_head.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import megatron_kd.losses as losses
from megatron_kd.head.output_weight import linear_logits
from megatron_kd.head.sizes import chunk_size
from megatron_kd.head.token_chunks import TokenChunks
from megatron_kd.losses import kd_cross_entropy, linear_kd_cross_entropy
from megatron_kd.parallel.vocab_shards import vocab_shard
from megatron_kd.targets import TopSelection, linear_targets

from .head_variants import Call, HeadInputs, Unavailable


def head(schedule: str) -> Callable[[torch.device], Call]:
    """Make linear_kd_cross_entropy on the cached target, with a memory strategy of the head.

    The mean is a sum and a division: the strategy may need a uniform upstream gradient.
    """

    def call(inputs: HeadInputs, hidden: Tensor, weight: Tensor) -> Tensor:
        # "direct" adds to main_grad in the forward, so the token weights must have the division.
        mask = (
            torch.full(inputs.labels.shape, 1.0 / inputs.tokens, device=hidden.device)
            if schedule == "direct"
            else None
        )
        loss = linear_kd_cross_entropy(
            hidden,
            weight,
            inputs.labels,
            inputs.target,
            alpha=inputs.alpha,
            loss_mask=mask,
            schedule=schedule,
        ).total.sum()
        return loss if schedule == "direct" else loss / inputs.tokens

    return lambda device: call


def head_ce(device: torch.device) -> Call:
    """Make the head's cross-entropy without a teacher."""
    return lambda inputs, hidden, weight: (
        linear_kd_cross_entropy(hidden, weight, inputs.labels, None, alpha=0.0).total.sum()
        / inputs.tokens
    )


def given_logits(device: torch.device) -> Call:
    """Make kd_cross_entropy on full logits."""
    return lambda inputs, hidden, weight: (
        kd_cross_entropy(
            hidden @ weight.t(), inputs.labels, inputs.target, alpha=inputs.alpha
        ).total.sum()
        / inputs.tokens
    )


def targets(device: torch.device) -> Call:
    """Make the selection of the teacher's top entries."""
    return lambda inputs, hidden, weight: linear_targets(
        inputs.teacher_hidden, inputs.teacher_weight, TopSelection(inputs.top_k)
    )


def online(device: torch.device) -> Call:
    """Make the selection of targets and the loss on them."""

    def call(inputs: HeadInputs, hidden: Tensor, weight: Tensor) -> Tensor:
        target = linear_targets(
            inputs.teacher_hidden, inputs.teacher_weight, TopSelection(inputs.top_k)
        )
        return (
            linear_kd_cross_entropy(
                hidden, weight, inputs.labels, target, alpha=inputs.alpha
            ).total.sum()
            / inputs.tokens
        )

    return call


def dense(divergence: str) -> Callable[[torch.device], Call]:
    """Make a divergence from the teacher's full distribution."""

    def make(device: torch.device) -> Call:
        if not hasattr(losses, "linear_divergence"):
            raise Unavailable("not in this version")

        def call(inputs: HeadInputs, hidden: Tensor, weight: Tensor) -> Tensor:
            teacher = losses.DenseTeacher(inputs.teacher_hidden, inputs.teacher_weight)
            loss = losses.linear_divergence(
                hidden, weight, inputs.labels, teacher, divergence=divergence, alpha=1.0
            )
            return loss.total.sum() / inputs.tokens

        return call

    return make


def teacher_product(device: torch.device) -> Call:
    """Make the teacher's logits chunk by chunk, as linear_targets does, and drop them."""

    def call(inputs: HeadInputs, hidden: Tensor, weight: Tensor) -> None:
        vocab = inputs.teacher_weight.shape[0]
        shard = vocab_shard(vocab, rank=0, size=1, vocab_size=None)
        chunks = TokenChunks(
            inputs.tokens, 1, chunk_size(None, vocab, inputs.tokens, on_cuda=hidden.is_cuda)
        )
        for _ in linear_logits(inputs.teacher_hidden, inputs.teacher_weight, shard, chunks, None):
            pass

    return call
