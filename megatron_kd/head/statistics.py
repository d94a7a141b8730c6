"""Statistics of rows of logits split into a few support ids and the rest, over a sharded vocabulary.

Teacher and student go through this one function, so identical models have a divergence of exactly zero. Support and rest
are summed apart: the rest's mass is never 1 - sum(support), which in fp32 loses all its digits once the support holds
almost everything. Everything is relative to the row's largest logit, so logits of 1e4 cost no precision.

Shapes: C tokens of a chunk, n valid vocabulary rows on this rank, K support slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kd.head.logit_rows import ChunkRows, is_tempered
from megatron_kd.parallel.collectives import Group, all_gather


@dataclass
class RowStatistics:
    """One row of values per token, identical on every rank. Logs are natural; `shift` is subtracted where it says so.

    shift [C]: the row's largest logit. support [C, K]: support logits - shift, -inf in unused slots. label [C]: label's
    logit - shift. logsumexp, rest_logsumexp [C]: over all ids / over ids outside the support, minus shift; the _t pair is
    of (logits - shift) / temperature. rest_shift [C]: the largest logit of the rest (0 if it has none); rest_mass [C] (and
    rest_mass_t): sum of exp(logit - rest_shift) over the rest, at least 1. rest_sum [C] (sum of the rest's logits) and
    entropy [C] where asked for.
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
    """A number, or [C] as what divides [C, K]."""
    return temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature


def local_columns(ids: Tensor, start: int, valid: int) -> Tensor:
    """Columns of global `ids` among the logits of [start, start + valid); `valid`, the sink, for what is elsewhere."""
    columns = ids.long() - start
    return torch.where((columns >= 0) & (columns < valid), columns, valid)


def row_statistics(
    rows: ChunkRows,
    indices: Tensor,
    labels: Tensor,
    *,
    vocab_start: int,
    temperature: float | Tensor = 1.0,
    group: Group = None,
    rest_sum: bool = False,
    entropy: bool = False,
) -> RowStatistics:
    """Statistics of each row split at `indices`, which are lifted out of `rows`. One all-gather of [C, K + 6].

    Args:
        rows: [C, n] fp32 or fp64, this rank's logits.
        indices: [C, K] global ids, -1 = unused. labels: [C] global ids, anything outside the vocabulary = none.
        temperature: one for all rows, or each row's own, of the rows' type [C].
    """
    columns = local_columns(indices, vocab_start, rows.valid)
    label = local_columns(labels, vocab_start, rows.valid)
    packed = rows.split(columns, label, temperature, total=rest_sum, entropy=entropy)
    return _merge(all_gather(packed, group), temperature, rest_sum=rest_sum, entropy=entropy)


def row_logsumexp(rows: ChunkRows, *, temperature: float, group: Group) -> Tensor:
    """logsumexp(logits / temperature) [C] over the whole vocabulary. One all-gather of [2, C]."""
    largest, mass = all_gather(torch.stack(rows.mass(temperature)), group).unbind(1)
    return (mass.log() + largest / temperature).logsumexp(0)


def _merge(
    parts: Tensor, temperature: float | Tensor, *, rest_sum: bool, entropy: bool
) -> RowStatistics:
    """Packed [T, C, 6 + K] of all ranks -> the global statistics, in rank order, the same bits on every rank."""
    local_shift, mass, mass_t, total, weighted = parts[..., :5].unbind(-1)
    support, label = parts[..., 6:].amax(0), parts[..., 5].amax(0)
    here = mass != 0  # not `> 0`: a NaN must reach the loss
    # The rest has a shift of its own: far below the support, its logsumexp relative to `shift` has no digits for its shape.
    rest_shift = torch.where(here, local_shift, -torch.inf).amax(0)
    shift = torch.maximum(rest_shift, support.amax(1)) if support.shape[1] else rest_shift
    below = torch.where(here, local_shift - rest_shift, -torch.inf)
    rest_mass, rest_mass_t = (
        (mass * below.exp()).sum(0),
        (mass_t * (below / temperature).exp()).sum(0),
    )
    rest = rest_mass.log() + (rest_shift - shift)
    tempered = is_tempered(temperature)
    rest_t = rest if not tempered else rest_mass_t.log() + (rest_shift - shift) / temperature
    relative = support - shift.unsqueeze(1)
    logsumexp = torch.logaddexp(relative.logsumexp(1), rest)
    merged = RowStatistics(
        shift=shift,
        support=relative,
        label=label - shift,
        logsumexp=logsumexp,
        rest_logsumexp=rest,
        logsumexp_t=torch.logaddexp((relative / over_entries(temperature)).logsumexp(1), rest_t)
        if tempered
        else logsumexp,
        rest_logsumexp_t=rest_t,
        rest_shift=torch.where(here.any(0), rest_shift, 0.0),
        rest_mass=rest_mass.clamp(min=1.0),
        rest_mass_t=rest_mass_t.clamp(min=1.0),
    )
    if rest_sum:
        merged.rest_sum = total.sum(0) - torch.where(support > -torch.inf, support, 0.0).sum(1)
    if entropy:
        # Mean of (logit - shift) under p: the rest rank by rank, then the support.
        away = torch.where(here, local_shift - shift, -torch.inf)
        rank_mean = torch.where(here, weighted / mass.clamp(min=1e-37) + away, 0.0)
        weight = (torch.where(here, mass.log() + away, -torch.inf) - logsumexp).exp()
        p = (relative - logsumexp.unsqueeze(1)).exp()
        mean = (weight * rank_mean).sum(0) + (p * torch.where(p > 0, relative, 0.0)).sum(1)
        merged.entropy = (logsumexp - mean).clamp(min=0.0)
    return merged
