"""Merge and split the query, key and value projections, one tensor in megatron-core."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_kd.config import ModelSection
from megatron_kd.models.huggingface.tensor_names import head_dim


def merge_qkv(parts: list[Tensor], model: ModelSection) -> Tensor:
    """Return the merged projection: for each query group its queries, its key and its value.

    Args:
        parts: q [heads * d, ...], k and v [groups * d, ...], where d is the head dimension.
        model: numbers of heads and query groups.

    Returns:
        [(heads + 2 * groups) * d, ...].
    """
    groups = model.num_query_groups or model.num_attention_heads
    q, k, v = (part.view(groups, -1, head_dim(model), *part.shape[1:]) for part in parts)
    return torch.cat([q, k, v], dim=1).flatten(0, 2)


def split_qkv(merged: Tensor, model: ModelSection) -> list[Tensor]:
    """Return q, k and v of a merged projection: the inverse of `merge_qkv`."""
    groups, heads = model.num_query_groups or model.num_attention_heads, model.num_attention_heads
    grouped = merged.view(groups, heads // groups + 2, head_dim(model), *merged.shape[1:])
    return [part.flatten(0, 2) for part in grouped.split([heads // groups, 1, 1], dim=1)]
