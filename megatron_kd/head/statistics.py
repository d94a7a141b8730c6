"""Compute statistics of logit rows that are split into a few support ids and the rest.

Teacher and student go through this one function, so identical models have a divergence of exactly
zero. Support and rest are summed separately: 1 - sum(support) would lose all its digits in fp32
once the support holds almost all mass. Everything is relative to the row's largest logit, so logits
of 1e4 cost no precision.

Shapes: C tokens of a chunk, n valid vocabulary rows on this rank, K support slots, T ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kd.head.logit_rows import ChunkRows, is_tempered
from megatron_kd.parallel.collectives import Group, all_gather


@dataclass(frozen=True)
class StatisticsQuery:
    """Select the statistics to compute.

    Attributes:
        temperature: one for all rows, or each row's, [C] of the rows' type.
        rest_sum: True to compute `RowStatistics.rest_sum`.
        entropy: True to compute `RowStatistics.entropy`.
    """

    temperature: float | Tensor = 1.0
    rest_sum: bool = False
    entropy: bool = False


@dataclass
class RowStatistics:
    """Hold the statistics of C rows, identical on every rank. Logarithms are natural.

    Attributes:
        shift: [C], the row's largest logit.
        support: [C, K], support logits - shift, -inf in unused slots.
        label: [C], the label's logit - shift.
        logsumexp: [C], over all ids, minus shift.
        rest_logsumexp: [C], over the ids outside the support, minus shift.
        logsumexp_t: [C], over all ids, of (logits - shift) / temperature.
        rest_logsumexp_t: [C], over the ids outside the support, of (logits - shift) / temperature.
        rest_shift: [C], the largest logit of the rest, 0 if the rest is empty.
        rest_mass: [C], sum of exp(logit - rest_shift) over the rest, at least 1.
        rest_mass_t: [C], the same of (logit - rest_shift) / temperature.
        rest_sum: [C], sum of the rest's logits, or None.
        entropy: [C], of the distribution at temperature 1, nats, or None.
    """

    shift: Tensor
    support: Tensor
    label: Tensor
    logsumexp: Tensor
    rest_logsumexp: Tensor
    logsumexp_t: Tensor
    rest_logsumexp_t: Tensor
    rest_shift: Tensor
    rest_mass: Tensor
    rest_mass_t: Tensor
    rest_sum: Tensor | None = None
    entropy: Tensor | None = None


def over_entries(temperature: float | Tensor) -> float | Tensor:
    """Return a temperature in the form that divides [C, K]: a number, or [C, 1]."""
    return temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature


def local_columns(ids: Tensor, start: int, valid: int) -> Tensor:
    """Return the columns of global ids among the logits of [start, start + valid).

    Ids of other ranks get the column `valid`, which no logit occupies.
    """
    columns = ids.long() - start
    return torch.where((columns >= 0) & (columns < valid), columns, valid)


def row_statistics(
    rows: ChunkRows,
    indices: Tensor,
    *,
    labels: Tensor | None = None,
    vocab_start: int,
    group: Group = None,
    query: StatisticsQuery | None = None,
) -> RowStatistics:
    """Return the statistics of each row, split at `indices`, which are removed from `rows`.

    Args:
        rows: [C, n] fp32 or fp64, this rank's logits.
        indices: [C, K] global ids, -1 for an unused slot.
        labels: [C] global ids; any id outside the vocabulary, or None: no label.
        vocab_start: id of the first column.
        group: tensor-parallel group.
        query: which statistics, and at which temperature; None: the default query.

    Collectives:
        One all-gather of [C, K + 6].
    """
    query = query or StatisticsQuery()
    columns = local_columns(indices, vocab_start, rows.valid)
    label = (
        torch.full((len(rows.buffer),), rows.valid, device=rows.buffer.device)
        if labels is None
        else local_columns(labels, vocab_start, rows.valid)
    )
    packed = rows.split(
        columns, label, query.temperature, total=query.rest_sum, entropy=query.entropy
    )
    return _merge(all_gather(packed, group), query)


def row_logsumexp(rows: ChunkRows, *, temperature: float, group: Group) -> Tensor:
    """Return logsumexp(logits / temperature) [C] over the vocabulary; one all-gather of [2, C]."""
    largest, mass = all_gather(torch.stack(rows.mass(temperature)), group).unbind(1)
    return (mass.log() + largest / temperature).logsumexp(0)


def _merge(packed: Tensor, query: StatisticsQuery) -> RowStatistics:
    """Return the global statistics of `packed` [T, C, 6 + K] of all ranks, in rank order."""
    temperature = query.temperature
    local_shift, mass, mass_t, total, weighted = packed[..., :5].unbind(-1)
    support, label = packed[..., 6:].amax(0), packed[..., 5].amax(0)
    has_rest = mass != 0  # not `> 0`: a NaN must reach the loss
    # Relative to `shift`, a rest far below the support would have no digits left for its shape.
    rest_shift = torch.where(has_rest, local_shift, -torch.inf).amax(0)
    shift = torch.maximum(rest_shift, support.amax(1)) if support.shape[1] else rest_shift
    below = torch.where(has_rest, local_shift - rest_shift, -torch.inf)
    rest_mass = (mass * below.exp()).sum(0)
    rest_mass_t = (mass_t * (below / temperature).exp()).sum(0)
    rest = rest_mass.log() + (rest_shift - shift)
    relative = support - shift.unsqueeze(1)
    logsumexp = torch.logaddexp(relative.logsumexp(1), rest)
    rest_t, logsumexp_t = rest, logsumexp
    if is_tempered(temperature):
        rest_t = rest_mass_t.log() + (rest_shift - shift) / temperature
        logsumexp_t = torch.logaddexp((relative / over_entries(temperature)).logsumexp(1), rest_t)
    merged = RowStatistics(
        shift=shift,
        support=relative,
        label=label - shift,
        logsumexp=logsumexp,
        rest_logsumexp=rest,
        logsumexp_t=logsumexp_t,
        rest_logsumexp_t=rest_t,
        rest_shift=torch.where(has_rest.any(0), rest_shift, 0.0),
        rest_mass=rest_mass.clamp(min=1.0),
        rest_mass_t=rest_mass_t.clamp(min=1.0),
    )
    if query.rest_sum:
        merged.rest_sum = total.sum(0) - torch.where(support > -torch.inf, support, 0.0).sum(1)
    if query.entropy:
        rest_offset = torch.where(has_rest, local_shift - shift, -torch.inf)
        merged.entropy = _entropy(merged, mass, weighted, rest_offset)
    return merged


def _entropy(
    statistics: RowStatistics, mass: Tensor, weighted: Tensor, rest_offset: Tensor
) -> Tensor:
    """Return the entropy [C] as logsumexp minus the mean of (logit - shift).

    Args:
        statistics: of all ranks.
        mass: [T, C], each rank's sum of exp(logit - m) over its rest, m its largest logit there.
        weighted: [T, C], each rank's sum of (logit - m) exp(logit - m).
        rest_offset: [T, C], m - shift, -inf for a rank without a rest.
    """
    has_rest, logsumexp, support = mass != 0, statistics.logsumexp, statistics.support
    rank_mean = torch.where(has_rest, weighted / mass.clamp(min=1e-37) + rest_offset, 0.0)
    rank_weight = (torch.where(has_rest, mass.log() + rest_offset, -torch.inf) - logsumexp).exp()
    p = (support - logsumexp.unsqueeze(1)).exp()
    mean = (rank_weight * rank_mean).sum(0) + (p * torch.where(p > 0, support, 0.0)).sum(1)
    return (logsumexp - mean).clamp(min=0.0)
