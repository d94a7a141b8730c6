"""Every divergence of `losses/divergence_terms.py` through the chunked head, against a sparse target or the whole teacher.

Against a sparse target the chunk's logits are walked as for forward_kl (`losses/sparse_loss.py`): only the derivative on the kept
ids and on the rest differ. Against the whole teacher its logits are multiplied chunk by chunk beside the student's, and the
logit gradient replaces the student's logits at once, so that a chunk holds two buffers [C, V/tp] and nothing outlives it but
what the schedule keeps.

Gradient with respect to the student's logits z: with f' the derivative of an id's term with respect to its log p, G the sum
of all f', s = w k c / t and a as in `losses/sparse_loss.py`,
    a p + s (f' - p^t G), on the label further - w e
and for ids that share one entry (the bucket, whose mass is r) f' p^t / r in place of f'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from megatron_kd.config.divergences import sparse_problem
from megatron_kd.head.chunked_head import ChunkLoss
from megatron_kd.head.logit_rows import ChunkRows
from megatron_kd.head.output_weight import compute_dtype, linear_logits
from megatron_kd.head.statistics import over_entries
from megatron_kd.losses.dense_loss import DivergenceLoss
from megatron_kd.losses.divergence_terms import ABSENT, Divergence
from megatron_kd.losses.head import HeadOptions, check_head, head_loss, run_head, token_weights
from megatron_kd.losses.sparse_loss import TokenLoss
from megatron_kd.losses.spec import KDLoss, LossSpec, TokenTerms, check_inputs
from megatron_kd.parallel.collectives import Group, group_rank, group_size
from megatron_kd.parallel.vocab_shards import VocabShard, vocab_shard
from megatron_kd.targets.dense import DenseTarget, Target, same_vocabulary_ranges
from megatron_kd.targets.sparse import SparseTarget


def linear_divergence(
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
    """Cross-entropy mixed with any divergence from the teacher, vocabulary-parallel, without full logits on either side.

    total = ((1 - alpha) ce + alpha kd + z_loss logsumexp^2) loss_mask, where kd is the divergence at the temperature, times
    temperature^2 where asked for. Formulas, directions and sources: `losses/divergence_terms.py`. The student is always
    normalised over the whole vocabulary.

    Args:
        hidden, weight, labels, loss_mask, vocab_size, tp_group, sequence_parallel, chunk_tokens: as in
            `linear_kd_cross_entropy`.
        teacher: a DenseTarget: whole distributions are compared and `tail` is not used. Or a SparseTarget [S, B, K]:
            tail "bucket" compares distributions over the kept ids and one entry for all others, on both sides;
            "renormalize" takes the kept entries rescaled to 1 and 0 elsewhere, where that is finite and can be summed.
        divergence: a name, or a Divergence with its parameters.
        schedule: as in `linear_kd_cross_entropy` with a SparseTarget. With a DenseTarget "auto" is "save" where all logits
            are few and else "chunk" (then the upstream gradient must be one value for all tokens), and there is no
            "recompute".
    Returns:
        KDLoss [S, B], identical on every rank of the group; computed in fp32 (fp64 for fp64 inputs).
    Raises:
        ValueError: bad sizes, types, scalars or targets, and divergences that a target cannot serve, before any collective.
        RuntimeError: a second backward, or an upstream gradient that the schedule cannot serve.
    Collectives: with a SparseTarget those of `linear_kd_cross_entropy`. With a DenseTarget per chunk all-gathers of [C, 7]
        and [C, 2] (of [C] more for mse_logits), a sum of the gradient of hidden, and all-gathers of both hidden states under
        sequence_parallel.
    """
    chosen = divergence if isinstance(divergence, Divergence) else Divergence(divergence)
    spec = LossSpec(alpha, temperature, temperature_squared, tail, z_loss)
    options = HeadOptions(vocab_size, tp_group, sequence_parallel, schedule, chunk_tokens)
    return DivergenceHead(chosen)(
        hidden, weight, labels, teacher, spec, options, loss_mask=loss_mask
    )[0]


@dataclass(frozen=True)
class DivergenceHead:
    """`linear_divergence` in the form of `losses.head.head_loss`, for a divergence chosen beforehand. target: or None."""

    divergence: Divergence

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        target: Target | None,
        spec: LossSpec,
        options: HeadOptions,
        *,
        loss_mask: Tensor | None = None,
        terms: TokenTerms | None = None,
    ) -> tuple[KDLoss, Tensor | None]:
        """[S, B] losses and the columns of `losses.rows.HEALTH` [S, B, 5] if asked for.

        terms: of each token, see TokenTerms; None: the spec's. With a DenseTarget both temperatures are numbers.
        """
        chosen = self.divergence
        if isinstance(target, DenseTarget):
            return _dense_loss(
                hidden, weight, labels, target, spec, options, loss_mask, chosen, terms
            )
        if target is None or chosen.name == "forward_kl":
            return head_loss(
                hidden, weight, labels, target, spec, options, loss_mask=loss_mask, terms=terms
            )
        problem = sparse_problem(
            chosen.name,
            {"ab_alpha": chosen.ab_alpha, "ab_beta": chosen.ab_beta},
            tail=spec.tail,
            sampled=target.sampled,
        )
        if problem is not None:
            raise ValueError(problem)
        token_loss = partial(SparseDivergenceLoss, divergence=chosen)
        return head_loss(
            hidden,
            weight,
            labels,
            target,
            spec,
            options,
            loss_mask=loss_mask,
            terms=terms,
            token_loss=token_loss,
        )


def _dense_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: DenseTarget,
    spec: LossSpec,
    options: HeadOptions,
    loss_mask: Tensor | None,
    divergence: Divergence,
    terms: TokenTerms | None,
) -> tuple[KDLoss, Tensor | None]:
    """Any divergence from the whole teacher."""
    if options.schedule == "recompute":
        raise ValueError(
            'schedule = "recompute" cannot serve a dense teacher: use "save", "chunk" or "direct"'
        )
    shard = check_head(hidden, weight, labels, options)
    check_inputs(
        labels,
        None,
        loss_mask,
        replace(spec, alpha=0.0, weights="mix"),
        vocab_size=shard.vocab_size,
        terms=terms,
    )
    each = terms or spec.terms()
    if isinstance(each.temperature, Tensor) or isinstance(each.teacher_temperature, Tensor):
        raise ValueError(
            "a dense teacher is compared at one temperature for all tokens: use sparse targets"
        )
    flat = each.map(Tensor.flatten)
    teacher_shard = _teacher_shard(hidden, weight, teacher, shard, options.tp_group)
    mask = token_weights(labels, loss_mask)
    schedule, chunks = options.plan(labels.numel(), shard, on_cuda=hidden.is_cuda)
    if schedule == "auto":  # the teacher's logits exist once, so there is nothing to recompute from
        schedule = "chunk"
    states = teacher.hidden.reshape(-1, teacher.hidden.shape[-1])
    teacher_rows = linear_logits(states, teacher.weight, teacher_shard, chunks, options.tp_group)
    gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)

    def make_loss(rows: ChunkRows, take: Callable[[Tensor], Tensor]) -> ChunkLoss:
        # The head asks for each chunk once and in order, so the teacher's chunks simply follow.
        loss = DivergenceLoss(
            take(labels.flatten()),
            take(mask),
            divergence,
            spec,
            flat.map(take),
            shard,
            options.tp_group,
        )
        loss.measure(rows, next(teacher_rows)[1], gradient=gradient, health=options.health)
        return loss

    return run_head(hidden, weight, labels, make_loss, shard, replace(options, schedule=schedule))


def _teacher_shard(
    hidden: Tensor, weight: Tensor, teacher: DenseTarget, shard: VocabShard, group: Group
) -> VocabShard:
    """The teacher's shard on this rank; ValueError on every rank alike where the teacher does not fit beside the student."""
    theirs, size = teacher.weight, group_size(group)
    if (
        theirs.dim() != 2
        or teacher.hidden.shape[-1] != theirs.shape[1]
        or teacher.hidden.dtype != theirs.dtype
    ):
        raise ValueError(
            f"the teacher's hidden {tuple(teacher.hidden.shape)} {teacher.hidden.dtype} and weight {tuple(theirs.shape)} {theirs.dtype} "
            "must end in the same width and have the same type"
        )
    if teacher.hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"the teacher's hidden {tuple(teacher.hidden.shape)} must have the student's leading shape {tuple(hidden.shape[:-1])}: "
            "the same tokens in the same layout"
        )
    if compute_dtype(theirs.dtype) != compute_dtype(weight.dtype):
        raise ValueError(
            f"the teacher is {theirs.dtype} and the student {weight.dtype}: both must be float64, or neither"
        )
    if theirs.shape[0] * size < shard.vocab_size or not same_vocabulary_ranges(
        theirs.shape[0], shard.rows, shard.vocab_size
    ):
        raise ValueError(
            f"the teacher's weight has {theirs.shape[0]} vocabulary rows on each of {size} rank(s) and the student's {shard.rows}: "
            f"each rank must hold the same ids of the {shard.vocab_size}, so pad both vocabularies to the same size"
        )
    return vocab_shard(
        theirs.shape[0], rank=group_rank(group), size=size, vocab_size=shard.vocab_size
    )


class SparseDivergenceLoss(TokenLoss):
    """`TokenLoss` with another divergence: over the kept ids and one entry for the rest, [C, K + 1] on every rank."""

    def __init__(
        self,
        rows: ChunkRows,
        labels: Tensor,
        weight: Tensor,
        target: SparseTarget | None,
        spec: LossSpec,
        shard: VocabShard,
        group: Group,
        *,
        divergence: Divergence,
        terms: TokenTerms | None = None,
        health: bool = False,
    ) -> None:
        super().__init__(
            rows, labels, weight, target, spec, shard, group, terms=terms, health=health
        )
        stats, used = self.stats, self.indices >= 0
        there = torch.cat([used, (self.others > 0).unsqueeze(1)], 1)
        support = stats.support / over_entries(
            self.terms.temperature
        ) - stats.logsumexp_t.unsqueeze(1)
        log_p = torch.cat([support, (stats.rest_logsumexp_t - stats.logsumexp_t).unsqueeze(1)], 1)
        log_q = torch.cat([self.log_q, self.log_tail.unsqueeze(1)], 1)
        if divergence.name == "hard_label":
            log_q = torch.where(_likeliest(log_q, self.indices), 0.0, ABSENT)
        log_p, log_q = (torch.where(there, t, ABSENT).clamp(min=ABSENT) for t in (log_p, log_q))
        found, self.slopes = divergence.terms_and_slopes(log_q, log_p, shard.vocab_size)
        self.kd = found.sum(1)

    def _divergence(self) -> Tensor:
        return self.kd

    def _slopes(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.slopes[:, :-1], self.slopes[:, -1], self.slopes.sum(1)


def _likeliest(log_q: Tensor, indices: Tensor) -> Tensor:
    """bool [C, K + 1]: the kept entry with the largest log_q, of equal ones that with the smallest id; never the last, the rest."""
    kept = log_q[:, :-1]
    best = kept == kept.amax(1, keepdim=True)
    first = torch.where(best, indices, torch.iinfo(indices.dtype).max).amin(1, keepdim=True)
    return torch.nn.functional.pad(best & (indices == first), (0, 1))
