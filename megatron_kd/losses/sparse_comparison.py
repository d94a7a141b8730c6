"""Hold the entries on which a sparse target and the student are compared, and the slopes.

Shapes: C tokens of a chunk, K kept ids, V vocabulary size. All tensors are identical on every rank
of the tensor-parallel group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kd.head.logit_rows import MASKED
from megatron_kd.head.statistics import RowStatistics, over_entries
from megatron_kd.targets.sparse import SparseTarget, kept_distribution

# Logarithm of the probability of an entry that does not exist, on both sides. Finite, so that the
# difference of two of them is 0.
ABSENT = MASKED


@dataclass(frozen=True)
class TeacherEntries:
    """Hold the teacher's side at its temperature in the loss.

    Attributes:
        indices: [C, K] global ids, -1 for an unused slot.
        log_q: [C, K] log-probabilities of the kept ids, -inf in unused slots.
        log_tail: [C] log of the mass outside the kept ids, -inf if it is 0 or not used.
        num_others: int [C], number of ids outside the kept ones.
    """

    indices: Tensor
    log_q: Tensor
    log_tail: Tensor
    num_others: Tensor


@dataclass(frozen=True)
class StudentEntries:
    """Hold the student's side at its temperature in the loss.

    Attributes:
        log_support: [C, K] log-probabilities of the kept ids.
        log_rest: [C] log of the mass of all other ids.
        log_rest_sum: [C] sum of the log-probabilities of all other ids; None unless tail is
            "uniform".
    """

    log_support: Tensor
    log_rest: Tensor
    log_rest_sum: Tensor | None


@dataclass(frozen=True)
class SparseComparison:
    """Hold both sides and what happens to the teacher's mass outside the kept ids."""

    teacher: TeacherEntries
    student: StudentEntries
    tail: str
    vocab_size: int


@dataclass(frozen=True)
class Slopes:
    """Hold derivatives of a divergence with respect to the student's log-probabilities.

    With tail "uniform", the equal share that each other id gets is in none of them but `total`.

    Attributes:
        support: [C, K], of each kept id.
        rest: [C], of all other ids together.
        total: [C], sum over all ids. It falls on every id times minus its probability, because
            the student is normalised.
    """

    support: Tensor
    rest: Tensor
    total: Tensor


def teacher_entries(
    target: SparseTarget,
    *,
    temperature: float | Tensor,
    tail: str,
    vocab_size: int,
    dtype: torch.dtype,
) -> TeacherEntries:
    """Return the teacher's side of a target [C, K].

    Args:
        target: the target of a chunk.
        temperature: the teacher's, a number or [C].
        tail: treatment of the mass outside the kept ids.
        vocab_size: V.
        dtype: type of the logits.
    """
    log_q, log_tail = kept_distribution(target, temperature=temperature, tail=tail)
    log_q, log_tail = log_q.to(dtype), log_tail.to(dtype)
    indices = torch.where(log_q > -torch.inf, target.indices, -1)
    return TeacherEntries(indices, log_q, log_tail, vocab_size - (indices >= 0).sum(1))


def no_entries(labels: Tensor, *, vocab_size: int, dtype: torch.dtype) -> TeacherEntries:
    """Return an empty teacher's side for labels [C] without a target."""
    indices = labels.new_empty((labels.shape[0], 0))
    log_tail = torch.full(labels.shape, -torch.inf, dtype=dtype, device=labels.device)
    num_others = torch.full_like(labels, vocab_size, dtype=torch.int64)
    return TeacherEntries(indices, indices.to(dtype), log_tail, num_others)


def student_entries(
    statistics: RowStatistics, num_others: Tensor, temperature: float | Tensor
) -> StudentEntries:
    """Return the student's side from the statistics of its rows, split at the kept ids.

    Args:
        statistics: at `temperature`.
        num_others: int [C], number of ids outside the kept ones.
        temperature: the student's, a number or [C].
    """
    scaled = statistics.support / over_entries(temperature)
    log_support = scaled - statistics.logsumexp_t.unsqueeze(1)
    log_rest = statistics.rest_logsumexp_t - statistics.logsumexp_t
    log_rest_sum = None
    if statistics.rest_sum is not None:
        log_rest_sum = (
            statistics.rest_sum - num_others * statistics.shift
        ) / temperature - num_others * statistics.logsumexp_t
    return StudentEntries(log_support, log_rest, log_rest_sum)
