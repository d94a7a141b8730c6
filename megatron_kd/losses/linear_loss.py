"""Compute the losses of hidden states through the output head, without the logits of all tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_kd.config.declarations.divergences import sparse_problem
from megatron_kd.head.chunked_head import run_head
from megatron_kd.head.options import HeadOptions, check_head
from megatron_kd.head.output_weight import LogitChunks, compute_dtype, linear_logits
from megatron_kd.losses.dense_loss import DenseLoss
from megatron_kd.losses.divergence import Divergence
from megatron_kd.losses.sparse_loss import SparseLoss
from megatron_kd.losses.spec import KDLoss, LossInputs, LossSpec, check_inputs
from megatron_kd.parallel.collectives import Group, group_rank, group_size
from megatron_kd.parallel.vocab_shards import VocabShard, vocab_shard
from megatron_kd.targets.dense import DenseTarget, Target, same_vocabulary_ranges
from megatron_kd.targets.sparse import SparseTarget


def linear_kd_cross_entropy(  # noqa: PLR0913 (public signature)
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    target: SparseTarget | None,
    *,
    loss_mask: Tensor | None = None,
    alpha: float,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    tail: str = "renormalize",
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    tp_group: Group = None,
    sequence_parallel: bool = False,
    schedule: str = "auto",
    chunk_tokens: int | None = None,
) -> KDLoss:
    """Return cross-entropy and sparse distillation loss of hidden @ weight^T, vocabulary-parallel.

    Formulas: `reference_kd_cross_entropy`; gradients: `losses/sparse_loss.py`.

    Args:
        hidden: [S, B, H] or [N, H], any float type. Without sequence_parallel replicated over
            `tp_group`; with it this rank's slice of S. Its gradient has the same layout and is
            complete: summed over the group on return.
        weight: [V/tp, H], this rank's rows in id order; rows past vocab_size are padding and get
            zero gradient.
        labels: [S, B] (or [N]) int, the full sequence, already shifted; -100 is ignored.
        target: SparseTarget [S, B, K], the full sequence, the same on every rank; None requires
            alpha = 0.
        loss_mask: [S, B] float weight of each token in `total`.
        alpha: weight of the distillation loss, in [0, 1].
        temperature: divides both models' logits in the distillation loss, > 0.
        temperature_squared: True to multiply the distillation loss by temperature^2.
        tail: treatment of the teacher's mass outside the kept ids: "drop", "renormalize",
            "bucket" or "uniform".
        z_loss: weight of the squared logsumexp of the student, >= 0.
        vocab_size: true vocabulary size; None: every row is real.
        tp_group: tensor-parallel group; None: unsharded.
        sequence_parallel: True if hidden is this rank's slice of the sequence.
        schedule: memory strategy "auto", "save", "chunk", "direct" or "recompute", see
            `head/options.py`. If `weight` has a main_grad (megatron-core's
            DistributedDataParallel), its gradient is added there, by megatron-core's contract.
        chunk_tokens: tokens per chunk; None: from the shard's width (`head.sizes.chunk_size`).

    Returns:
        KDLoss [S, B], identical on every rank of the group; in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: bad sizes, types, scalars or targets, before any collective.
        RuntimeError: a second backward, or an upstream gradient that the memory strategy cannot
            serve.

    Collectives:
        Per chunk one all-gather of [C, K + 6] and a sum of the gradient of hidden (all-reduce, or
        reduce-scatter under sequence_parallel, which also gathers hidden); all but the first
        overlap with products.
    """
    spec = LossSpec(alpha, temperature, temperature_squared, tail, z_loss)
    options = HeadOptions(vocab_size, tp_group, sequence_parallel, schedule, chunk_tokens)
    return linear_loss(hidden, weight, LossInputs(labels, loss_mask), target, spec, options)[0]


def linear_divergence(  # noqa: PLR0913 (public signature)
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: Target,
    *,
    divergence: str | Divergence,
    loss_mask: Tensor | None = None,
    alpha: float,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    tail: str = "renormalize",
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    tp_group: Group = None,
    sequence_parallel: bool = False,
    schedule: str = "auto",
    chunk_tokens: int | None = None,
) -> KDLoss:
    """Return cross-entropy mixed with any divergence from the teacher, without full logits.

    total = ((1 - alpha) ce + alpha kd + z_loss logsumexp^2) loss_mask, where kd is the divergence
    at the temperature, times temperature^2 if requested. Formulas, directions and sources:
    `config/declarations/divergences.py`. The student is always normalised over the whole
    vocabulary.

    Args:
        hidden: as in `linear_kd_cross_entropy`.
        weight: as in `linear_kd_cross_entropy`.
        labels: as in `linear_kd_cross_entropy`.
        teacher: a DenseTeacher: whole distributions are compared and `tail` is not used. Or a
            SparseTarget [S, B, K]: tail "bucket" compares distributions over the kept ids and one
            entry for all others, on both sides; "renormalize" takes the kept entries rescaled to
            1 and 0 elsewhere, if that is finite and can be summed.
        divergence: a name, or a Divergence with its parameters.
        loss_mask: as in `linear_kd_cross_entropy`.
        alpha: as in `linear_kd_cross_entropy`.
        temperature: as in `linear_kd_cross_entropy`.
        temperature_squared: as in `linear_kd_cross_entropy`.
        tail: as in `linear_kd_cross_entropy`; most divergences take "bucket" or "renormalize".
        z_loss: as in `linear_kd_cross_entropy`.
        vocab_size: as in `linear_kd_cross_entropy`.
        tp_group: as in `linear_kd_cross_entropy`.
        sequence_parallel: as in `linear_kd_cross_entropy`.
        schedule: as in `linear_kd_cross_entropy` with a SparseTarget. With a DenseTeacher "auto"
            is "save" if all logits are few and else "chunk" (then the upstream gradient must be
            one value for all tokens), and there is no "recompute".
        chunk_tokens: as in `linear_kd_cross_entropy`.

    Returns:
        KDLoss [S, B], identical on every rank of the group; in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: bad sizes, types, scalars or targets, and divergences that a target cannot
            serve, before any collective.
        RuntimeError: a second backward, or an upstream gradient that the memory strategy cannot
            serve.

    Collectives:
        With a SparseTarget those of `linear_kd_cross_entropy`. With a DenseTeacher per chunk
        all-gathers of [C, 7] and [C, 2] (of [C] more for mse_logits), a sum of the gradient of
        hidden, and all-gathers of both hidden states under sequence_parallel.
    """
    chosen = divergence if isinstance(divergence, Divergence) else Divergence(divergence)
    spec = LossSpec(alpha, temperature, temperature_squared, tail, z_loss, divergence=chosen)
    options = HeadOptions(vocab_size, tp_group, sequence_parallel, schedule, chunk_tokens)
    return linear_loss(hidden, weight, LossInputs(labels, loss_mask), teacher, spec, options)[0]


def linear_loss(  # noqa: PLR0913 (the functions above with their scalars in two values)
    hidden: Tensor,
    weight: Tensor,
    inputs: LossInputs,
    target: Target | None,
    spec: LossSpec,
    options: HeadOptions,
    *,
    token_metrics: bool = False,
) -> tuple[KDLoss, dict[str, Tensor]]:
    """Return the losses of each token and, if requested, the token metrics.

    Args:
        hidden: as in `linear_kd_cross_entropy`.
        weight: as in `linear_kd_cross_entropy`.
        inputs: labels, mask and terms. With a DenseTarget both temperatures are numbers.
        target: sparse, dense, or None for cross-entropy alone.
        spec: scalars and divergence.
        options: layout and memory strategy.
        token_metrics: True to report the metrics of `losses/token_metrics.py`, which costs one
            more pass over each chunk.

    Returns:
        KDLoss [S, B], and metrics name -> [S, B], NaN where a metric is unknown; empty unless
        requested.

    Raises:
        ValueError: as in `linear_divergence`.
    """
    loss: SparseLoss | DenseLoss
    if isinstance(target, DenseTarget):
        shard = _check_dense(hidden, weight, inputs, target, spec, options)
        loss = DenseLoss(
            inputs,
            _teacher_logits(target, inputs, shard, options),
            spec,
            shard,
            options.tp_group,
            differentiate=torch.is_grad_enabled()
            and (hidden.requires_grad or weight.requires_grad),
            token_metrics=token_metrics,
        )
    else:
        shard = _check_sparse(hidden, weight, inputs, target, spec, options)
        loss = SparseLoss(
            inputs, target, spec, shard, options.tp_group, token_metrics=token_metrics
        )
    total, reported = run_head(hidden, weight, loss, shard, options)
    return KDLoss(total, reported.pop("ce"), reported.pop("kd")), reported


def _check_sparse(
    hidden: Tensor,
    weight: Tensor,
    inputs: LossInputs,
    target: SparseTarget | None,
    spec: LossSpec,
    options: HeadOptions,
) -> VocabShard:
    """Return this rank's vocabulary shard; ValueError unless a sparse target serves the loss."""
    if target is not None:
        problem = sparse_problem(
            spec.divergence.name,
            spec.divergence.parameters,
            tail=spec.tail,
            sampled=target.sampled,
        )
        if problem is not None:
            raise ValueError(problem)
    shard = check_head(hidden, weight, inputs.labels, options)
    check_inputs(inputs, target, spec, vocab_size=shard.vocab_size)
    return shard


def _check_dense(
    hidden: Tensor,
    weight: Tensor,
    inputs: LossInputs,
    target: DenseTarget,
    spec: LossSpec,
    options: HeadOptions,
) -> VocabShard:
    """Return this rank's vocabulary shard; ValueError unless a dense target serves the loss."""
    if options.strategy == "recompute":
        raise ValueError(
            'schedule = "recompute" cannot serve a dense teacher: use "save", "chunk" or "direct"'
        )
    shard = check_head(hidden, weight, inputs.labels, options)
    without_target = replace(spec, alpha=0.0, weights="mix")
    check_inputs(inputs, None, without_target, vocab_size=shard.vocab_size)
    terms = inputs.terms or spec.terms()
    if isinstance(terms.temperature, Tensor) or isinstance(terms.teacher_temperature, Tensor):
        raise ValueError(
            "a dense teacher is compared at one temperature for all tokens: use sparse targets"
        )
    _check_teacher(hidden, weight, target, shard, group_size(options.tp_group))
    return shard


def _check_teacher(
    hidden: Tensor, weight: Tensor, target: DenseTarget, shard: VocabShard, ranks: int
) -> None:
    """Raise ValueError, on every rank alike, if the teacher does not fit the student."""
    teacher_hidden, teacher_weight = target.hidden, target.weight
    if (
        teacher_weight.dim() != 2
        or teacher_hidden.shape[-1] != teacher_weight.shape[1]
        or teacher_hidden.dtype != teacher_weight.dtype
    ):
        raise ValueError(
            f"the teacher's hidden {tuple(teacher_hidden.shape)} {teacher_hidden.dtype} and weight "
            f"{tuple(teacher_weight.shape)} {teacher_weight.dtype} must end in the same width and "
            "have the same type"
        )
    if teacher_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"the teacher's hidden {tuple(teacher_hidden.shape)} must have the student's leading "
            f"shape {tuple(hidden.shape[:-1])}: the same tokens in the same layout"
        )
    if compute_dtype(teacher_weight.dtype) != compute_dtype(weight.dtype):
        raise ValueError(
            f"the teacher is {teacher_weight.dtype} and the student {weight.dtype}: both must be "
            "float64, or neither"
        )
    rows = teacher_weight.shape[0]
    if rows * ranks < shard.vocab_size or not same_vocabulary_ranges(
        rows, shard.rows, shard.vocab_size
    ):
        raise ValueError(
            f"the teacher's weight has {rows} vocabulary rows on each of {ranks} rank(s) and the "
            f"student's {shard.rows}: each rank must hold the same ids of the {shard.vocab_size}, "
            "so pad both vocabularies to the same size"
        )


def _teacher_logits(
    target: DenseTarget, inputs: LossInputs, shard: VocabShard, options: HeadOptions
) -> LogitChunks:
    """Return an iterator over the teacher's logits of the head's chunks."""
    group = options.tp_group
    teacher_shard = vocab_shard(
        target.weight.shape[0],
        rank=group_rank(group),
        size=group_size(group),
        vocab_size=shard.vocab_size,
    )
    states = target.hidden.reshape(-1, target.hidden.shape[-1])
    chunks = options.chunks(inputs.labels.numel(), shard, on_cuda=target.hidden.is_cuda)
    return linear_logits(states, target.weight, teacher_shard, chunks, group)
