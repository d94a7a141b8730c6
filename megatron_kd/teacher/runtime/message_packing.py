"""Pack sparse targets into integers that travel between ranks, and unpack them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kd.parallel.groups import Groups
from megatron_kd.targets import Target
from megatron_kd.targets.sparse import SparseTarget

KEY_WORDS = 4  # a sample's 128-bit key as int32


class TargetLayout(NamedTuple):
    """Describe what a target consists of; the same on every rank."""

    slots: int
    has_tail: bool
    has_entropy: bool
    sampled: bool
    temperature: float

    @property
    def width(self) -> int:
        """Return how many numbers of four bytes a token has."""
        return 2 * self.slots + self.has_tail + self.has_entropy


def agree_on_layout(targets: Sequence[Target | None], groups: Groups) -> TargetLayout:
    """Return on every rank the layout of what the teacher's last stage made.

    Collectives:
        One all-reduce over the world.
    """
    description = [0.0] * 5
    for target in targets:
        if isinstance(target, SparseTarget):
            description = [
                target.indices.shape[-1],
                float(target.log_tail is not None),
                float(target.entropy is not None),
                float(target.sampled),
                target.temperature,
            ]
    shared = torch.tensor(description, dtype=torch.float64, device=groups.platform.device)
    if groups.world_size > 1:
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    slots, has_tail, has_entropy, sampled, temperature = shared.tolist()
    return TargetLayout(int(slots), bool(has_tail), bool(has_entropy), bool(sampled), temperature)


def pack_targets(targets: Sequence[Target | None], samples: Tensor, layout: TargetLayout) -> Tensor:
    """Return int32 [N, S * W + 4]: each sample's numbers, position by position, and its key.

    Args:
        targets: [S, B, K] of the teacher's microbatches; None off its last stage, where the result
            is empty.
        samples: int32 [N, S + 4], tokens and keys.
        layout: what a target consists of.
    """
    parts = [_columns(target) for target in targets if isinstance(target, SparseTarget)]
    if not parts:
        return samples[:0]
    sequence_length = samples.shape[1] - KEY_WORDS
    numbers = torch.cat(parts)[: len(samples)]
    flat = numbers.reshape(len(samples), sequence_length * layout.width)
    return torch.cat([flat, samples[:, sequence_length:]], 1)


def _columns(target: SparseTarget) -> Tensor:
    """Return int32 [B, S, W] of a target [S, B, K]."""
    scalars = [scalar for scalar in (target.log_tail, target.entropy) if scalar is not None]
    columns = [target.indices.int(), target.logprobs.float().view(torch.int32)]
    columns += [scalar.float().unsqueeze(-1).view(torch.int32) for scalar in scalars]
    return torch.cat(columns, -1).transpose(0, 1)


def unpack_targets(
    numbers: Tensor, layout: TargetLayout, batch_sizes: Sequence[int]
) -> list[Target | None]:
    """Return a target [S, B, K] for each microbatch.

    Args:
        numbers: int32 [n, S, W] of all samples.
        layout: what a target consists of.
        batch_sizes: samples of each microbatch, n in all.
    """
    targets: list[Target | None] = []
    for part in numbers.split(list(batch_sizes)):
        columns = part.transpose(0, 1).contiguous()
        scalars = columns[..., 2 * layout.slots :].contiguous().view(torch.float32)
        logprobs = columns[..., layout.slots : 2 * layout.slots].contiguous()
        targets.append(
            SparseTarget(
                columns[..., : layout.slots].contiguous(),
                logprobs.view(torch.float32),
                scalars[..., 0].contiguous() if layout.has_tail else None,
                scalars[..., -1].contiguous() if layout.has_entropy else None,
                layout.temperature,
                layout.sampled,
            )
        )
    return targets
