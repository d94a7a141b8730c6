"""Compute the loss in plain torch over the whole vocabulary, the reference of faster versions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_kd.losses.spec import IGNORED_LABEL, KDLoss, LossInputs, LossSpec, check_inputs
from megatron_kd.targets.sparse import SparseTarget, kept_distribution


def reference_kd_cross_entropy(  # noqa: PLR0913 (public signature)
    logits: Tensor,
    labels: Tensor,
    target: SparseTarget | None,
    *,
    alpha: float,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    tail: str = "renormalize",
    z_loss: float = 0.0,
) -> KDLoss:
    """Return next-token cross-entropy mixed with KL(teacher || student) on a sparse target.

    With p the student's softmax over all ids (p^t at temperature t), q the teacher's kept entries,
    o = 1 - sum(q):
        drop         kd = sum_k q_k (log q_k - log p^t_k), q unnormalised (sums to less than 1)
        renormalize  the same with q / sum(q)
        bucket       + o (log o - log r), r the student's mass outside the kept ids
        uniform      + sum over the V - K other ids of u (log u - log p^t), u = o / (V - K)
    times temperature^2 if requested.

    Args:
        logits: [..., V] any float type, all V columns real, before temperature. Not modified.
        labels: [...] int, next-token ids; -100 is ignored.
        target: SparseTarget [..., K] or None (then alpha must be 0).
        alpha: weight of the distillation loss, in [0, 1].
        temperature: divides both models' logits in the distillation loss, > 0.
        temperature_squared: True to multiply the distillation loss by temperature^2.
        tail: one of the four above.
        z_loss: weight of the squared logsumexp of the student, >= 0.

    Returns:
        KDLoss [...], differentiable in `total` only.

    Raises:
        ValueError: an argument out of range, or a target that lacks what `tail` and `temperature`
            need.

    Source: arXiv 2410.16215 equations 1-4 (renormalize); the "other" bucket of arXiv 2605.23857.
    """
    spec = LossSpec(alpha, temperature, temperature_squared, tail, z_loss)
    check_inputs(LossInputs(labels), target, spec, vocab_size=logits.shape[-1])
    labels = labels.long()
    counted = labels != IGNORED_LABEL
    logsumexp = torch.logsumexp(logits, dim=-1)
    label_logit = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    ce = torch.where(counted, logsumexp - label_logit, 0.0)
    kd = torch.zeros_like(ce)
    if target is not None:
        kd = torch.where(counted, spec.kd_scale * _divergence(logits, target, spec), 0.0)
    total = (1.0 - alpha) * ce + alpha * kd + z_loss * torch.where(counted, logsumexp, 0.0) ** 2
    return KDLoss(total, ce.detach(), kd.detach())


def _divergence(logits: Tensor, target: SparseTarget, spec: LossSpec) -> Tensor:
    """Return forward KL [...] with its tail term, at the temperature, without temperature^2."""
    log_q, log_tail = kept_distribution(target, temperature=spec.temperature, tail=spec.tail)
    log_q, log_tail = log_q.to(logits.dtype), log_tail.to(logits.dtype)
    log_p = torch.log_softmax(logits / spec.temperature, dim=-1)
    used = log_q > -math.inf
    ids = torch.where(used, target.indices.long(), 0)
    is_kept = (
        torch.zeros(logits.shape, dtype=torch.int32, device=logits.device).scatter_add_(
            -1, ids, used.to(torch.int32)
        )
        > 0
    )
    q, o = log_q.exp(), log_tail.exp()
    kd = (q * torch.where(used, log_q - log_p.gather(-1, ids), 0.0)).sum(-1)
    num_others = (~is_kept).sum(-1)
    outside = (log_tail > -math.inf) & (num_others > 0)
    if spec.tail == "bucket":
        # A row that is -inf everywhere (all ids kept) has a NaN gradient even where it is not
        # used, so nothing is masked in such rows.
        log_r = log_p.masked_fill(is_kept & outside.unsqueeze(-1), -math.inf).logsumexp(-1)
        kd = kd + torch.where(outside, o * (torch.where(outside, log_tail, 0.0) - log_r), 0.0)
    if spec.tail == "uniform":
        share = torch.where(outside, o / num_others.clamp(min=1), 0.0)
        log_share = torch.where(
            outside, log_tail - num_others.clamp(min=1).to(log_tail.dtype).log(), 0.0
        )
        kd = kd + share * (num_others * log_share - log_p.masked_fill(is_kept, 0.0).sum(-1))
    return kd
