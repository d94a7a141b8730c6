"""Write the weights of a checkpoint as a Hugging Face folder, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_kd.checkpoint.conversion.checkpoint_weights import CheckpointWeights
from megatron_kd.checkpoint.conversion.output import atomic_folder, check_is_new, write_files
from megatron_kd.checkpoint.conversion.qkv import split_qkv
from megatron_kd.checkpoint.store import CheckpointInfo, check_digests
from megatron_kd.models.huggingface.config_json import config_from_model
from megatron_kd.models.huggingface.safetensors import write_safetensors
from megatron_kd.models.huggingface.tensor_names import huggingface_names, tensor_mappings

_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def write_huggingface(  # noqa: PLR0913 (independent options of one export)
    output: Path,
    folder: Path,
    info: CheckpointInfo,
    *,
    max_positions: int,
    special_ids: Mapping[str, int] | None = None,
    shard_bytes: int = 2 * 10**9,
    files: Mapping[str, bytes] | None = None,
    setting: str = "input",
) -> dict[str, Any]:
    """Write a checkpoint of this package as a Hugging Face folder.

    Args:
        output: the new folder; must not exist.
        folder: the checkpoint; all its digests are verified first.
        info: content of its state.json.
        max_positions: max_position_embeddings of config.json.
        special_ids: ids of special tokens for config.json, such as bos_token_id.
        shard_bytes: largest size of a safetensors file.
        files: further files of `output` (the tokenizer's), name -> content.
        setting: name of `folder` in error messages.

    Returns:
        The content of config.json.

    Raises:
        ConfigError: the checkpoint is damaged, or `output` exists.
    """
    check_is_new(output)
    check_digests(folder, info, setting=setting)
    model = info.model_section()
    weights = CheckpointWeights(folder, model, info.vocab_size, setting=setting)
    dtypes = weights.dtypes()
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    config = config_from_model(
        model,
        vocab_size=info.vocab_size,
        dtype=_DTYPE_NAMES[dtype],
        max_positions=max_positions,
        special_ids=special_ids,
    )
    config_file = (json.dumps(config, indent=2) + "\n").encode()
    with atomic_folder(output) as hidden:
        write_safetensors(hidden, _huggingface_tensors(weights, dtype), shard_bytes=shard_bytes)
        write_files(hidden, {"config.json": config_file, **(files or {})})
    return config


def _huggingface_tensors(
    weights: CheckpointWeights, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    model = weights.model
    for mapping, layer in tensor_mappings(model):
        tensor = weights.read(mapping, layer).to(dtype)
        parts = (
            split_qkv(tensor, model)
            if mapping.kind == "qkv"
            else tensor.chunk(len(mapping.huggingface_names))
        )
        yield from zip(huggingface_names(mapping, layer), parts, strict=True)
