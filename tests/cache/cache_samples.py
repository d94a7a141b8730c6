"""Make samples with targets, and compare them with those of a cache."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_kd.cache import CacheIdentity, CacheReader
from megatron_kd.targets import SparseTarget, TopSelection, select_targets

S, V = 16, 500
SELECTION = TopSelection(6, top_p=0.9)
IDENTITY = CacheIdentity("ab" * 32, "cd" * 32, V, S, SELECTION, "fp32")
Sample = tuple[Tensor, SparseTarget]


def samples(seed: int, count: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (count, S), generator=generator)
    return [
        (sample, select_targets(3 * torch.randn(S, V, generator=generator), SELECTION))
        for sample in tokens
    ]


def same(a: SparseTarget, b: SparseTarget) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def holds(directory: Path, expected: list[Sample]) -> bool:
    reader = CacheReader(directory, expect=IDENTITY)
    return len(reader) == len(expected) and all(
        same(reader.get(tokens), target) for tokens, target in expected
    )
