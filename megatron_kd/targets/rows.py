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

from megatron_kd.parallel.collectives import Group, all_gather

# Finite, so that 0 * PUNCHED is 0: with -inf the entropy's p * z would be NaN at every punched column.
PUNCHED = -1e30


@dataclass
class RowStatistics:
    """One row of values per token, identical on every rank. Logs are natural; `shift` is subtracted where it says so.

    shift [C]: the row's largest logit. support [C, K]: support logits - shift, -inf in unused slots. label [C]: label's
    logit - shift. logsumexp, rest_logsumexp [C]: over all ids / over ids outside the support, minus shift; the _t pair is
    of (logits - shift) / temperature. local_shift [C] and exp [C, n + 1] (and exp_t): on this rank, exp(logit - local_shift)
    of the rest, zero on the support. rest_shift [C]: the largest logit of the rest (0 if it has none); rest_mass [C] (and
    rest_mass_t): sum of exp(logit - rest_shift) over the rest, at least 1. rest_sum [C] and entropy [C] where asked for.
    """

    shift: Tensor
    local_shift: Tensor
    support: Tensor
    label: Tensor
    logsumexp: Tensor
    rest_logsumexp: Tensor
    logsumexp_t: Tensor
    rest_logsumexp_t: Tensor
    rest_shift: Tensor
    rest_mass: Tensor
    rest_mass_t: Tensor
    exp: Tensor
    exp_t: Tensor
    rest_sum: Tensor | None = None
    entropy: Tensor | None = None


def local_columns(ids: Tensor, start: int, valid: int) -> tuple[Tensor, Tensor]:
    """Columns of global `ids` in this rank's buffer, and which are here; what is elsewhere points at the sink column."""
    columns = ids.long() - start
    here = (columns >= 0) & (columns < valid)
    return torch.where(here, columns, valid), here


def row_statistics(
    buffer: Tensor,
    indices: Tensor,
    labels: Tensor,
    *,
    vocab_start: int,
    temperature: float = 1.0,
    group: Group = None,
    rest_sum: bool = False,
    entropy: bool = False,
) -> RowStatistics:
    """Statistics of each row of `buffer` split at `indices`. Consumes `buffer`. One all-gather of [C, K + 6].

    Args:
        buffer: [C, n + 1] fp32 or fp64, this rank's logits and one sink column (any value). Overwritten.
        indices: [C, K] global ids, -1 = unused. labels: [C] global ids, anything outside the vocabulary = none.
    """
    valid = buffer.shape[1] - 1
    buffer[:, valid] = PUNCHED
    columns, here = local_columns(indices, vocab_start, valid)
    label_column, label_here = local_columns(labels.unsqueeze(1), vocab_start, valid)
    support = buffer.gather(1, columns).masked_fill(~here, -torch.inf)
    label = buffer.gather(1, label_column).masked_fill(~label_here, -torch.inf)
    total = buffer[:, :valid].sum(1) if rest_sum else None
    buffer.scatter_(1, columns, PUNCHED)
    local_shift = buffer.amax(1)
    local_shift = torch.where(local_shift <= PUNCHED, 0.0, local_shift)
    buffer.sub_(local_shift.unsqueeze(1))
    exp_t = (buffer / temperature).exp_() if temperature != 1.0 else None
    weighted = None
    if entropy:
        exp = buffer.exp()
        weighted = (buffer.mul_(exp)).sum(1)
        buffer = exp
    else:
        buffer.exp_()
    mass = buffer.sum(1)
    mass_t = mass if exp_t is None else exp_t.sum(1)
    zero = torch.zeros_like(mass)
    packed = torch.cat(
        [
            torch.stack([local_shift, mass, mass_t, total if total is not None else zero, weighted if weighted is not None else zero], 1),
            label,
            support,
        ],
        dim=1,
    )
    merged = _merge(all_gather(packed, group), temperature, rest_sum=rest_sum, entropy=entropy)
    return RowStatistics(local_shift=local_shift, exp=buffer, exp_t=buffer if exp_t is None else exp_t, **merged)


def _merge(parts: Tensor, temperature: float, *, rest_sum: bool, entropy: bool) -> dict[str, Tensor]:
    """Packed [T, C, 6 + K] of all ranks -> the global statistics, in rank order, the same bits on every rank."""
    local_shift, mass, mass_t, total, weighted = parts[..., :5].unbind(-1)
    support, label = parts[..., 6:].amax(0), parts[..., 5].amax(0)
    here = mass != 0  # not `> 0`: a NaN must reach the loss
    shift = torch.where(here, local_shift, -torch.inf).amax(0)
    if support.shape[1]:
        shift = torch.maximum(shift, support.amax(1))
    # The rest has a shift of its own: far below the support, its logsumexp relative to `shift` has no digits for its shape.
    rest_shift = torch.where(here, local_shift, -torch.inf).amax(0)
    below = torch.where(here, local_shift - rest_shift, -torch.inf)
    rest_mass, rest_mass_t = (mass * below.exp()).sum(0), (mass_t * (below / temperature).exp()).sum(0)
    rest = rest_mass.log() + (rest_shift - shift)
    rest_t = rest_mass_t.log() + (rest_shift - shift) / temperature
    away = torch.where(here, local_shift - shift, -torch.inf)
    relative = support - shift.unsqueeze(1)
    merged = {
        "shift": shift,
        "rest_shift": torch.where(here.any(0), rest_shift, 0.0),
        "rest_mass": rest_mass.clamp(min=1.0),
        "rest_mass_t": rest_mass_t.clamp(min=1.0),
        "support": relative,
        "label": label - shift,
        "rest_logsumexp": rest,
        "rest_logsumexp_t": rest_t,
        "logsumexp": torch.logaddexp(relative.logsumexp(1), rest),
        "logsumexp_t": torch.logaddexp((relative / temperature).logsumexp(1), rest_t),
    }
    if rest_sum:
        merged["rest_sum"] = total.sum(0) - torch.where(support > -torch.inf, support, 0.0).sum(1)
    if entropy:
        # Mean of (logit - shift) under p: the rest rank by rank, then the support.
        rank_mean = torch.where(here, weighted / mass.clamp(min=1e-37) + away, 0.0)
        weight = (torch.where(here, mass.log() + away, -torch.inf) - merged["logsumexp"]).exp()
        p = (relative - merged["logsumexp"].unsqueeze(1)).exp()
        mean = (weight * rank_mean).sum(0) + (p * torch.where(p > 0, relative, 0.0)).sum(1)
        merged["entropy"] = (merged["logsumexp"] - mean).clamp(min=0.0)
    return merged
