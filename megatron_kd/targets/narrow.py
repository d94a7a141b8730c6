"""Derive the target of a smaller top-k selection from a stored one.

One cache can so serve a grid of selections.
"""

from __future__ import annotations

import re

import torch

from megatron_kd.targets.select import TopSelection
from megatron_kd.targets.sparse import SparseTarget, sort_by_logprob

_TEXT = re.compile(
    r"TopSelection\(top_k=(\d+), top_p=([\d.e-]+), min_k=(\d+), temperature=([\d.e-]+)\)"
)


def parse_top_selection(text: str) -> TopSelection | None:
    """Return the selection that `text` is the repr of; None for any other text."""
    match = _TEXT.fullmatch(text)
    if match is None:
        return None
    return TopSelection(int(match[1]), float(match[2]), int(match[3]), float(match[4]))


def is_contained(selection: TopSelection, stored: TopSelection) -> bool:
    """Return whether targets of `selection` can be derived from targets of `stored`.

    For that, the entries of any token must be among the stored ones, and the tail must follow from
    them. Both temperatures must be 1: the mass of the stored entries at another one is not known.
    """
    if selection.temperature != 1.0 or stored.temperature != 1.0:
        return False
    if selection.top_k > stored.top_k:
        return False
    if stored.top_p == 1.0:
        return True
    return selection.top_p <= stored.top_p and selection.min_k <= stored.min_k


def narrow(target: SparseTarget, selection: TopSelection) -> SparseTarget:
    """Return what `selection` keeps of a target at temperature 1, with its own tail.

    The choice is the one that the selection itself would make: by falling probability, ties to the
    smaller id, and of those the prefix whose mass reaches top_p.

    Args:
        target: [..., K], of a selection that contains `selection` (see `is_contained`).
        selection: the smaller selection.

    Returns:
        Target [..., min(K, top_k)], the most probable entries first.
    """
    used = target.indices >= 0
    ids, log_q = sort_by_logprob(target.indices, torch.where(used, target.logprobs, -torch.inf))
    ids = torch.where(log_q > -torch.inf, ids, -1)
    keep = torch.arange(ids.shape[-1], device=ids.device) < selection.top_k
    if selection.top_p < 1.0:
        mass = log_q.exp()
        prefix = mass.cumsum(-1) - mass < selection.top_p
        prefix[..., : selection.min_k] = True
        keep = keep & prefix
    keep = keep & (ids >= 0)
    slots = min(selection.top_k, ids.shape[-1])
    log_tail = None
    if target.log_tail is not None:
        dropped = torch.where(keep, -torch.inf, log_q).logsumexp(-1)
        log_tail = torch.logaddexp(dropped, target.log_tail)
    return SparseTarget(
        torch.where(keep, ids, -1)[..., :slots],
        torch.where(keep, log_q, -torch.inf)[..., :slots],
        log_tail,
        target.entropy,
    )
