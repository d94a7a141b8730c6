"""Make tiny random models of every family with transformers, and convert them on ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

VOCAB, TOKENS, CACHED = 101, 48, 40

BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    # Large weights, so that a wrong position, norm or head shows in the logits.
    "initializer_range": 0.25,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Name -> (class prefix in transformers, its configuration).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "Llama",
        {"tie_word_embeddings": False, "rope_parameters": LLAMA3, "rms_norm_eps": 1e-5},
    ),
    "llama_tied": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
    "mistral": ("Mistral", {"tie_word_embeddings": False, "sliding_window": 64, "head_dim": 16}),
}
LAYOUTS: dict[str, dict[str, int]] = {"one": {}, "tp2": {"tensor": 2}, "pp2": {"pipeline": 2}}


def make_model(
    folder: Path, name: str, *, seed: int, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """Save a random model of `name` in `folder` and return it.

    Norms and biases are random too: ones and zeros would hide a swap.
    """
    import transformers

    prefix, settings = FAMILIES[name]
    config = getattr(transformers, f"{prefix}Config")(**{**BASE, **settings, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif parameter_name.endswith("bias"):
                parameter.normal_(0.0, 0.5)
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    return model


@dataclass
class Conversion:
    """Hold what was measured for one family.

    Attributes:
        difference: largest difference of our logits from those of transformers, by layout.
        scale: largest logit.
        same_weights: True if the exported weights equal the original ones.
        exported_difference: largest difference of transformers' logits after the export.
    """

    difference: dict[str, float] = field(default_factory=dict)
    scale: float = 0.0
    same_weights: bool = False
    exported_difference: float = float("nan")


def convert_all(rendezvous: str, root: Path, seed: int) -> dict[str, Conversion]:
    """Convert each family on rank 0, and compare its logits in three layouts on two ranks."""
    from megatron_kd.parallel.platform import start_platform

    platform = start_platform("cpu")
    from megatron_kd.config import ParallelSection
    from megatron_kd.parallel.groups import start_groups, stop_groups

    conversions: dict[str, Conversion] = {}
    tokens = torch.randint(VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(seed + 1))
    for layout, sizes in LAYOUTS.items():
        parallel = ParallelSection(**sizes)
        groups = start_groups(platform, parallel, timeout_seconds=120, rendezvous=rendezvous)
        if not conversions:
            conversions = {
                name: _convert(root / name, name, seed, tokens)
                if groups.rank == 0
                else Conversion()
                for name in FAMILIES
            }
        dist.barrier()
        for name, conversion in conversions.items():
            conversion.difference[layout] = _difference(root / name, groups, parallel, tokens)
    stop_groups()
    return conversions


def _convert(folder: Path, name: str, seed: int, tokens: torch.Tensor) -> Conversion:
    """Import a model, export it again, and compare both folders."""
    from megatron_kd.checkpoint.conversion.from_huggingface import (
        open_huggingface,
        write_checkpoint,
    )
    from megatron_kd.checkpoint.conversion.to_huggingface import write_huggingface
    from megatron_kd.checkpoint.store import read_info
    from megatron_kd.inference.logit_parity import huggingface_logits
    from megatron_kd.models.huggingface.safetensors import SafetensorsFolder

    make_model(folder / "huggingface", name, seed=seed)
    expected = huggingface_logits(folder / "huggingface", tokens)
    torch.save(expected, folder / "expected.pt")
    source = open_huggingface(folder / "huggingface", vocab_size_multiple=8)
    checkpoint = write_checkpoint(folder / "checkpoint", source, tokenizer=None)
    info = read_info(checkpoint, setting="test")
    write_huggingface(folder / "exported", checkpoint, info, max_positions=256, shard_bytes=20_000)
    original, exported = (
        SafetensorsFolder(folder / name, setting="test") for name in ("huggingface", "exported")
    )
    same_weights = original.tensors.keys() == exported.tensors.keys() and all(
        torch.equal(original.read(key), exported.read(key)) for key in original.tensors
    )
    exported_logits = huggingface_logits(folder / "exported", tokens)
    return Conversion(
        {},
        float(expected.abs().max()),
        same_weights,
        float((exported_logits - expected).abs().max()),
    )


def _difference(folder: Path, groups: Any, parallel: Any, tokens: torch.Tensor) -> float:
    """Return the largest difference of our logits from transformers' on any rank."""
    from megatron_kd.checkpoint.store import find_checkpoint, read_info
    from megatron_kd.inference.frozen_model import FrozenModel, KeyValueCache
    from megatron_kd.planning.parameters import rank_parameters

    checkpoint = find_checkpoint(folder / "checkpoint", setting="test")
    info = read_info(checkpoint, setting="test")
    model = FrozenModel(
        checkpoint, info, groups, parallel, precision="fp32", sequence_length=TOKENS
    )
    layout = {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "stage": groups.pipeline_rank,
    }
    assert sum(weight.numel() for weight in model.chunk.parameters()) == rank_parameters(
        info.model_section(), VOCAB, **layout
    ), folder
    hidden = model.hidden(tokens)
    # Again with a key/value cache: most tokens at once, the last ones one by one.
    cache = KeyValueCache(len(tokens), TOKENS)
    continued = [model.hidden(tokens[:, :CACHED], 0, cache)]
    continued += [
        model.hidden(tokens[:, position : position + 1], position, cache)
        for position in range(CACHED, TOKENS)
    ]
    difference = torch.tensor(0.0)
    if hidden is not None:
        expected = torch.load(folder / "expected.pt", weights_only=True)
        logits, cached = (
            model.logits(states).transpose(0, 1) for states in (hidden, torch.cat(continued))
        )
        difference = torch.max(
            (logits - expected).abs().max(), (cached - expected[:, CACHED - 1 :]).abs().max()
        )
    dist.all_reduce(difference, op=dist.ReduceOp.MAX)
    return float(difference)
