"""Write Hugging Face folders without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_kd.config import ModelSection
from megatron_kd.models.huggingface.config_json import config_from_model
from megatron_kd.models.huggingface.tensor_names import (
    huggingface_names,
    huggingface_shapes,
    tensor_mappings,
)


def write_folder(
    folder: Path,
    model: ModelSection,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> Path:
    """Write random normal weights of standard deviation `scale`, with norms near one."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for mapping, layer in tensor_mappings(model):
        for name, shape in zip(
            huggingface_names(mapping, layer),
            huggingface_shapes(mapping, model, model.vocab_size or 0),
            strict=True,
        ):
            noise = torch.randn(shape, generator=generator) * scale
            tensors[name] = (noise + 1.0 if name.endswith("norm.weight") else noise).to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = config_from_model(
        model, vocab_size=model.vocab_size or 0, dtype="float32", max_positions=64
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


MODEL = ModelSection(
    hidden_size=16,
    num_layers=2,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=24,
    vocab_size=50,
    vocab_size_multiple=16,
    qkv_bias=True,
)


def write_small_folder(folder: Path, **options: Any) -> Path:
    """Write a folder of MODEL; see `write_folder`."""
    return write_folder(folder, MODEL, **options)
