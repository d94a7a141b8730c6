"""A part of a stored target: what another selection would have kept of the same teacher. One cache serves a grid of them."""

from __future__ import annotations

import re

import torch

from megatron_kd.targets.select import TopSelection
from megatron_kd.targets.sparse import SparseTarget, sort_by_logprob

_TEXT = re.compile(
    r"TopSelection\(top_k=(\d+), top_p=([\d.e-]+), min_k=(\d+), temperature=([\d.e-]+)\)"
)


def parse_top_selection(text: str) -> TopSelection | None:
    """The selection whose text this is; None for any other."""
    found = _TEXT.fullmatch(text)
    return (
        TopSelection(int(found[1]), float(found[2]), int(found[3]), float(found[4]))
        if found
        else None
    )


def is_contained(wanted: TopSelection, stored: TopSelection) -> bool:
    """Whether what `wanted` keeps of any token is among what `stored` kept, and what it says of the tail can be computed.

    Both at temperature 1: the mass of the stored entries at another one is not known.
    """
    if wanted.temperature != 1.0 or stored.temperature != 1.0 or wanted.top_k > stored.top_k:
        return False
    return stored.top_p == 1.0 or (wanted.top_p <= stored.top_p and wanted.min_k <= stored.min_k)


def narrow(target: SparseTarget, wanted: TopSelection) -> SparseTarget:
    """What `wanted` keeps of a target [..., K] at temperature 1, with its own tail: [..., min(K, top_k)], likeliest first.

    As the selection itself would choose: by falling probability, ties to the smaller id; the prefix whose mass reaches top_p.
    """
    used = target.indices >= 0
    ids, log_q = sort_by_logprob(target.indices, torch.where(used, target.logprobs, -torch.inf))
    ids = torch.where(log_q > -torch.inf, ids, -1)
    keep = torch.arange(ids.shape[-1], device=ids.device) < wanted.top_k
    if wanted.top_p < 1.0:
        mass = log_q.exp()
        prefix = mass.cumsum(-1) - mass < wanted.top_p
        prefix[..., : wanted.min_k] = True
        keep = keep & prefix
    keep = keep & (ids >= 0)
    slots = min(wanted.top_k, ids.shape[-1])
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
