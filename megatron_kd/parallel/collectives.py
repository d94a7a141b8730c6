"""Run collectives on plain tensors and objects over an explicit group.

A group of None or of size 1 sends nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None
Value = TypeVar("Value")


def group_size(group: Group) -> int:
    """Return the number of ranks in the group; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: Group) -> int:
    """Return this process's rank in the group; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


def all_gather(tensor: Tensor, group: Group) -> Tensor:
    """Gather a tensor [...] of each of T ranks into [T, ...] on all, in rank order.

    Collectives:
        One all-gather.
    """
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
    """Exchange tensors of different sizes between the ranks of a group.

    Args:
        sends: Rank -> the tensor that it receives, of the dtype of `like`.
        sizes: Rank -> how many elements it sends to this rank.
        like: A tensor with the dtype and device of all.
        group: Group that numbers the ranks; None for the world.

    Returns:
        Rank -> the elements it sent, as a flat tensor.

    Collectives:
        One all-to-all over the group; none if it has one rank.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return {rank: tensor.reshape(-1) for rank, tensor in sends.items()}
    ranks = range(dist.get_world_size(group))
    outgoing = [sends[rank].reshape(-1) if rank in sends else like.new_empty(0) for rank in ranks]
    out_sizes = [len(tensor) for tensor in outgoing]
    in_sizes = [sizes.get(rank, 0) for rank in ranks]
    received = like.new_empty(sum(in_sizes))
    dist.all_to_all_single(received, torch.cat(outgoing), in_sizes, out_sizes, group=group)
    tensors = zip(ranks, received.split(in_sizes), strict=True)
    return {rank: tensor for rank, tensor in tensors if len(tensor)}


@dataclass
class Pending:
    """Hold a tensor that a collective is still filling, and keep its input alive.

    Attributes:
        tensor: The result, valid after `wait`.
        work: Handle of the collective; None once it was waited for.
        source: Input that must not be freed before the collective ends.
    """

    tensor: Tensor
    work: dist.Work | None = None
    source: Tensor | None = None

    def wait(self) -> Tensor:
        """Wait for the collective and return the tensor.

        On a GPU only the current stream waits.
        """
        if self.work is not None:
            self.work.wait()
            self.work = self.source = None
        return self.tensor


def start_all_gather(tensor: Tensor, group: Group) -> Pending:
    """Start an `all_gather` [...] -> [T, ...] that overlaps other work."""
    tensor, size = tensor.contiguous(), group_size(group)
    gathered = tensor.new_empty((size * tensor.shape[0], *tensor.shape[1:]))
    work = dist.all_gather_into_tensor(gathered, tensor, group=group, async_op=True)
    return Pending(gathered.view(size, *tensor.shape), work, tensor)


def start_all_reduce_sum(tensor: Tensor, group: Group) -> Pending:
    """Start an in-place sum over the group that overlaps other work.

    `tensor` must be contiguous.
    """
    return Pending(tensor, dist.all_reduce(tensor, group=group, async_op=True))


def start_reduce_scatter_sum(shard: Tensor, tensor: Tensor, group: Group) -> Pending:
    """Start a sum of partial tensors that leaves each of T ranks its shard.

    Args:
        shard: Output [c, ...]: this rank's part of the sum.
        tensor: Partial sums [T * c, ...] of this rank.
        group: Group of T ranks.
    """
    tensor = tensor.contiguous()
    work = dist.reduce_scatter_tensor(shard, tensor, group=group, async_op=True)
    return Pending(shard, work, tensor)


def raise_together(problem: str | None, error: type[Exception], group: Group = None) -> None:
    """Raise `error` on every rank if any rank has a problem, with the first rank's message.

    Args:
        problem: Message of this rank's problem; None if it has none.
        error: Type of the error to raise.
        group: Group of the ranks; None for the world.

    Collectives:
        One all-gather of objects over the group.
    """
    problems: list[str | None] = [problem]
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        problems = [None] * dist.get_world_size(group)
        dist.all_gather_object(problems, problem, group=group)
    for rank, message in enumerate(problems):
        if message is not None:
            raise error(message if problem is not None else f"rank {rank}: {message}")


def from_all_ranks(value: Value) -> list[Value]:
    """Return every rank's `value` (picklable), in rank order, on every rank.

    Collectives:
        One all-gather of objects over the world.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Value] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def to_rank_zero(value: Value) -> list[Value]:
    """Return every rank's `value` (picklable), in rank order, on rank 0; an empty list elsewhere.

    Collectives:
        One gather of objects over the world.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    is_first = dist.get_rank() == 0
    values: list[Value] = [value] * dist.get_world_size() if is_first else []
    dist.gather_object(value, values if is_first else None, dst=0)
    return values


def maximum(value: float, device: torch.device) -> float:
    """Return the greatest `value` of all ranks of the world, on every rank.

    Collectives:
        One all-reduce of a number over the world.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    tensor = torch.tensor([value], device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor.item())


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Return True on every rank of the world if `flag` is set on some rank.

    Collectives:
        One all-reduce of a number over the world.
    """
    return bool(maximum(float(flag), device))


def from_rank_zero(function: Callable[[], Value]) -> Value:
    """Call a function on rank 0 only, and return its value (picklable) on every rank.

    An error that it raises is raised on every rank.

    Collectives:
        One broadcast of an object over the world.
    """
    result: list[tuple[Value | None, Exception | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            result = [(function(), None)]
        except Exception as error:
            result = [(None, error)]
    dist.broadcast_object_list(result, src=0)
    value, problem = result[0]
    if problem is not None:
        raise problem
    return value  # type: ignore[return-value]
