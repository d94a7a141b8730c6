"""Make tiny runs with learnable tokens and a small GPT, and compare their weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_kd.config import RunConfig

VOCAB = 101

BASE: dict[str, Any] = {
    "model": {
        "hidden_size": 32,
        "num_layers": 4,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 64,
        "vocab_size": VOCAB,
        "vocab_size_multiple": 8,
    },
    "batch": {"global_batch_size": 4, "micro_batch_size": 2, "sequence_length": 24},
    "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
    "train": {
        "steps": 20,
        "seed": 7,
        "precision": "fp32",
        "device": "cpu",
        "timeout_seconds": 60.0,
    },
    "telemetry": {"tensorboard": False, "progress": "off", "peak_tflops": 1.0},
}


def write_tokens(folder: Path, *, tokens: int = 20_000, seed: int = 0, vocab: int = VOCAB) -> str:
    """Write a token file whose next id is a function of the last one, two times in three.

    Returns:
        The prefix of the file.
    """
    from megatron_kd.data.preparation.token_file_writer import TokenFileWriter

    rng = np.random.default_rng(seed)
    noise, flips = rng.integers(0, vocab, tokens), rng.random(tokens)
    stream = np.zeros(tokens, dtype=np.int64)
    for i in range(1, tokens):
        stream[i] = (stream[i - 1] * 7 + 3) % vocab if flips[i] < 0.66 else noise[i]
    prefix = folder / f"tokens{seed}"
    with TokenFileWriter(prefix, np.dtype("<u2")) as writer:
        lengths = np.full(tokens // 100, 100, dtype=np.int32)
        writer.add(stream[: lengths.sum()].astype("<u2"), lengths)
        writer.commit(tokenizer_digest="0" * 64, vocab_size=vocab)
    Path(f"{prefix}.json").unlink()
    return str(prefix)


def tiny(directory: Path, tokens: str, /, **overrides: Any) -> RunConfig:
    """Return BASE with overrides such as parallel={"tensor": 2}, merged key by key."""
    content = copy.deepcopy(BASE)
    content["data"] = {"train": [tokens]}
    content["run"] = {"directory": str(directory)}
    for section, keys in overrides.items():
        content.setdefault(section, {}).update(keys)
    return RunConfig.model_validate(content)


def full_weights(models: Any) -> dict[str, torch.Tensor]:
    """Return every parameter of the model, unsharded, by its checkpoint name.

    Collectives:
        Over the world.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    local_shards = []
    for model in models:
        state = model.sharded_state_dict()
        apply_factories(state)
        local_shards += [
            (
                s.key,
                tuple(s.global_shape),
                s.global_offset,
                s.prepend_axis_num,
                s.data.detach().float().clone(),
            )
            for s in nested_values(state)
            if isinstance(s, ShardedTensor)
        ]
    all_shards: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_shards, local_shards)
    weights: dict[str, torch.Tensor] = {}
    for key, shape, offset, prepended, data in (shard for shards in all_shards for shard in shards):
        target = weights.setdefault(key, torch.full(shape, torch.nan))
        data = data.view(*[1] * prepended, *data.shape)
        target[tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))] = data
    return weights
