"""Collectives on plain tensors and an explicit group. A group of None or size 1 costs nothing and sends nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def exchange(
    sends: Mapping[int, Tensor], sizes: Mapping[int, int], *, like: Tensor, group: Group = None
) -> dict[int, Tensor]:
    """Tensors to ranks of a group, and from them. One all-to-all over it; none where it has one rank.

    Args:
        sends: rank -> what it gets, of `like`'s type.
        sizes: rank -> how many numbers come from it.
        like: a tensor of the type and on the device of all.
        group: its ranks are numbered as in it; None: the world.
    Returns:
        rank -> what came from it, flat.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return {rank: tensor.reshape(-1) for rank, tensor in sends.items()}
    ranks = range(dist.get_world_size(group))
    outgoing = [sends[rank].reshape(-1) if rank in sends else like.new_empty(0) for rank in ranks]
    incoming = [sizes.get(rank, 0) for rank in ranks]
    received = like.new_empty(sum(incoming))
    dist.all_to_all_single(
        received, torch.cat(outgoing), incoming, [len(each) for each in outgoing], group=group
    )
    return {
        rank: part for rank, part in zip(ranks, received.split(incoming), strict=True) if len(part)
    }


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
    return Pending(
        mine, dist.reduce_scatter_tensor(mine, tensor, group=group, async_op=True), tensor
    )


def raise_together(problem: str | None, error: type[Exception], group: Group = None) -> None:
    """Raise `error` on every rank when any rank has a problem, with the first rank's sentence. One all-gather of objects."""
    problems: list[str | None] = [problem]
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        problems = [None] * dist.get_world_size(group)
        dist.all_gather_object(problems, problem, group=group)
    for rank, found in enumerate(problems):
        if found is not None:
            raise error(found if problem is not None else f"rank {rank}: {found}")


def from_all_ranks(value: Found) -> list[Found]:
    """Every rank's `value` (picklable), in rank order, on every rank. One all-gather of objects over the world."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Found] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def to_rank_zero(value: Found) -> list[Found]:
    """Every rank's `value` (picklable), in rank order, on rank 0; [] elsewhere. One gather of objects over the world."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    first = dist.get_rank() == 0
    values: list[Found] = [value] * dist.get_world_size() if first else []
    dist.gather_object(value, values if first else None, dst=0)
    return values


def maximum(value: float, device: torch.device) -> float:
    """The greatest `value` of the world: the same answer on all. One all-reduce of a number."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    found = torch.tensor([value], device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found.item())


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on some rank of the world: the same answer on all. One all-reduce of a number."""
    return bool(maximum(float(flag), device))


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
