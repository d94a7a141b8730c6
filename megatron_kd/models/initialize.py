"""Initialise weights as a function of seed, parameter name and layer, in any parallel layout."""

from __future__ import annotations

import hashlib
import math

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.transformer.module import MegatronModule

from megatron_kd.config import ModelSection
from megatron_kd.models.projections import PROJECTIONS

# Projections back into the residual stream are scaled down with depth (GPT-2 paper, section 2.3).
_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")
_VOCABULARY = ("word_embeddings.weight", "output_layer.weight")


@torch.no_grad()
def initialize_weights(
    chunks: list[MegatronModule], model: ModelSection, *, vocab_size: int, seed: int
) -> None:
    """Fill the parameters of this rank's chunks in place. No collective.

    Matrices are normal with standard deviation init_std, divided by sqrt(2 * num_layers) for
    projections back into the residual stream. Norms are one and biases zero. Projections to a
    teacher's width have standard deviation 1 / sqrt(student's width), which preserves the size of
    their input. Every rank draws the full matrix from a generator of the matrix and keeps its
    shard. Padding rows of the vocabulary are zero.

    Args:
        chunks: model chunks of this rank, one per virtual pipeline stage.
        model: shape of the model.
        vocab_size: true vocabulary size.
        seed: seed of the run.
    """
    for chunk in chunks:
        state = chunk.sharded_state_dict()
        apply_factories(state)
        for shard in nested_values(state):
            if isinstance(shard, ShardedTensor) and shard.data is not None:
                _fill(shard, model, vocab_size, seed)


def _fill(shard: ShardedTensor, model: ModelSection, vocab_size: int, seed: int) -> None:
    skip = shard.prepend_axis_num
    shape, offset = list(shard.global_shape[skip:]), shard.global_offset[skip:]
    if len(shape) < 2:
        shard.data.fill_(0.0 if shard.key.endswith("bias") else 1.0)
        return
    if shard.key.endswith(_VOCABULARY):
        shape[0] = vocab_size
    name = f"{seed}/{shard.key}/{tuple(shard.global_offset[:skip])}"
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
    )
    std = _standard_deviation(shard.key, model)
    matrix = torch.empty(shape).normal_(0.0, std, generator=generator)
    rows = min(max(shape[0] - offset[0], 0), shard.local_shape[-2])
    columns = slice(offset[1], offset[1] + shard.local_shape[-1])
    data = shard.data.view(shard.local_shape)
    data.zero_()
    data[:rows] = matrix[offset[0] : offset[0] + rows, columns].to(data.dtype)


def _standard_deviation(key: str, model: ModelSection) -> float:
    if key.startswith(PROJECTIONS):
        return 1 / math.sqrt(model.hidden_size)
    if key.endswith(_RESIDUAL):
        return model.init_std / math.sqrt(2 * model.num_layers)
    return model.init_std
