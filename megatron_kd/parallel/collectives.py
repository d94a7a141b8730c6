"""Collectives on plain tensors and an explicit group. A group of None or size 1 costs nothing and sends nothing."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def group_size(group: Group) -> int:
    """Ranks in the group; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: Group) -> int:
    """This rank's place in the group; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


def all_gather(tensor: Tensor, group: Group) -> Tensor:
    """[...] on each of T ranks -> [T, ...] on all, in rank order. One all-gather."""
    size = group_size(group)
    if size == 1:
        return tensor.unsqueeze(0)
    tensor = tensor.contiguous()
    gathered = tensor.new_empty((size * tensor.shape[0], *tensor.shape[1:]))
    dist.all_gather_into_tensor(gathered, tensor, group=group)
    return gathered.view(size, *tensor.shape)


def all_reduce_sum_(tensor: Tensor, group: Group) -> Tensor:
    """Sum over the group, in place. One all-reduce."""
    if group_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def gather_sequence(tensor: Tensor, group: Group) -> Tensor:
    """[S/T, ...] slices of a sequence -> [S, ...] on every rank. One all-gather."""
    return all_gather(tensor, group).flatten(0, 1) if group_size(group) > 1 else tensor


def scatter_sequence_sum(tensor: Tensor, group: Group) -> Tensor:
    """[S, ...] partial sums on every rank -> this rank's [S/T, ...] slice of the total. One reduce-scatter."""
    size = group_size(group)
    if size == 1:
        return tensor
    tensor = tensor.contiguous()
    mine = tensor.new_empty((tensor.shape[0] // size, *tensor.shape[1:]))
    dist.reduce_scatter_tensor(mine, tensor, group=group)
    return mine


def raise_together(problem: str | None, error: type[Exception], group: Group = None) -> None:
    """Raise `error` on every rank when any rank has a problem, with the first rank's sentence. One all-gather of objects."""
    problems: list[str | None] = [problem]
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        problems = [None] * dist.get_world_size(group)
        dist.all_gather_object(problems, problem, group=group)
    for rank, found in enumerate(problems):
        if found is not None:
            raise error(found if problem is not None else f"rank {rank}: {found}")
