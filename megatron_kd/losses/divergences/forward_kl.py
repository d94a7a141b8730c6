"""Define forward_kl, KL(teacher || student), with its closed form for sparse targets."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_kd.losses.sparse_comparison import Slopes, SparseComparison


def term(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return q (log q - log p)."""
    return log_q.exp() * (log_q - log_p)


def compare_sparse(comparison: SparseComparison) -> tuple[Tensor, Slopes]:
    """Return the divergence [C] and its slopes; formulas in `losses/reference.py`.

    Of the V - K ids outside the kept ones, "bucket" forms one entry, and "uniform" gives each an
    equal share of the tail, whose slope is not among those returned (see `Slopes`).
    """
    teacher, student, tail = comparison.teacher, comparison.student, comparison.tail
    q, tail_mass = teacher.log_q.exp(), teacher.log_tail.exp()
    divergence = (q * torch.where(q > 0, teacher.log_q - student.log_support, 0.0)).sum(1)
    outside = (tail_mass > 0) & (teacher.num_others > 0)
    if tail == "bucket":
        difference = teacher.log_tail - student.log_rest
        divergence = divergence + torch.where(outside, tail_mass * difference, 0.0)
    if tail == "uniform":
        count = teacher.num_others.clamp(min=1).to(q.dtype)  # log() of integers is fp32
        share = tail_mass / count
        assert student.log_rest_sum is not None
        missing = teacher.num_others * (teacher.log_tail - count.log()) - student.log_rest_sum
        divergence = divergence + torch.where(outside, share * missing, 0.0)
    in_bucket = (teacher.num_others > 0) & (tail == "bucket")
    kept_mass = q.sum(1) if tail == "drop" else torch.ones_like(tail_mass)
    rest_slope = -torch.where(in_bucket, tail_mass, 0.0)
    return divergence, Slopes(-q, rest_slope, -kept_mass)
