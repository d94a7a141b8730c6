"""Collectives on plain tensors and an explicit group. A group of None or size 1 costs nothing and sends nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None
Found = TypeVar("Found")


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


@dataclass
class Pending:
    """A tensor that a collective is still filling; keeps what it reads alive."""

    tensor: Tensor
    work: dist.Work | None = None
    source: Tensor | None = None

    def wait(self) -> Tensor:
        """The tensor, filled (on a GPU: for whatever the current stream does next)."""
        if self.work is not None:
            self.work.wait()
            self.work = self.source = None
        return self.tensor


def start_all_gather(tensor: Tensor, group: Group) -> Pending:
    """`all_gather` that goes on behind other work: [...] -> [T, ...]."""
    tensor, size = tensor.contiguous(), group_size(group)
    gathered = tensor.new_empty((size * tensor.shape[0], *tensor.shape[1:]))
    work = dist.all_gather_into_tensor(gathered, tensor, group=group, async_op=True)
    return Pending(gathered.view(size, *tensor.shape), work, tensor)


def start_all_reduce_sum(tensor: Tensor, group: Group) -> Pending:
    """Sum over the group, in place, behind other work; `tensor` must be contiguous."""
    return Pending(tensor, dist.all_reduce(tensor, group=group, async_op=True))


def start_reduce_scatter_sum(mine: Tensor, tensor: Tensor, group: Group) -> Pending:
    """[T * c, ...] partial sums on every rank -> this rank's [c, ...] of the total, in `mine`, behind other work."""
    tensor = tensor.contiguous()
    return Pending(mine, dist.reduce_scatter_tensor(mine, tensor, group=group, async_op=True), tensor)


def raise_together(problem: str | None, error: type[Exception], group: Group = None) -> None:
    """Raise `error` on every rank when any rank has a problem, with the first rank's sentence. One all-gather of objects."""
    problems: list[str | None] = [problem]
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        problems = [None] * dist.get_world_size(group)
        dist.all_gather_object(problems, problem, group=group)
    for rank, found in enumerate(problems):
        if found is not None:
            raise error(found if problem is not None else f"rank {rank}: {found}")


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on some rank of the world: the same answer on all. One all-reduce of a number."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    found = torch.tensor([float(flag)], device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found.item())


def from_rank_zero(find: Callable[[], Found]) -> Found:
    """What `find`, called on rank 0 alone, returns there (picklable); what it raises is raised on every rank.

    One broadcast of an object over the world.
    """
    told: list[tuple[Found | None, Exception | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            told = [(find(), None)]
        except Exception as error:
            told = [(None, error)]
    dist.broadcast_object_list(told, src=0)
    found, problem = told[0]
    if problem is not None:
        raise problem
    return found  # type: ignore[return-value]
