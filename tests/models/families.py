"""Tiny random models of every family, made by transformers; and what ranks do with them."""

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
    """A random model of `name`, saved in `folder`. Norms and biases are random too: ones and zeros would hide a swap."""
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
class Found:
    """difference: of logits by layout. back: whether the weights came back identical. again: difference of transformers' logits."""

    difference: dict[str, float] = field(default_factory=dict)
    scale: float = 0.0
    back: bool = False
    again: float = float("nan")


def convert_all(rendezvous: str, root: Path, seed: int) -> dict[str, Found]:
    """On two ranks: each family to ours and back (rank 0), and its logits in three layouts."""
    from megatron_kd.parallel.platform import start_platform

    platform = start_platform("cpu")
    from megatron_kd.config import ParallelSection
    from megatron_kd.parallel.groups import start_groups, stop_groups

    found: dict[str, Found] = {}
    tokens = torch.randint(VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(seed + 1))
    for layout, sizes in LAYOUTS.items():
        parallel = ParallelSection(**sizes)
        groups = start_groups(platform, parallel, timeout_seconds=120, rendezvous=rendezvous)
        if not found:
            found = {
                name: _there_and_back(root / name, name, seed, tokens)
                if groups.rank == 0
                else Found()
                for name in FAMILIES
            }
        dist.barrier()
        for name, each in found.items():
            each.difference[layout] = _difference(root / name, groups, parallel, tokens)
    stop_groups()
    return found


def _there_and_back(folder: Path, name: str, seed: int, tokens: torch.Tensor) -> Found:
    from megatron_kd.checkpoint.conversion.from_huggingface import (
        open_huggingface,
        write_checkpoint,
    )
    from megatron_kd.checkpoint.conversion.to_huggingface import write_huggingface
    from megatron_kd.checkpoint.store import read_info
    from megatron_kd.inference.logit_parity import huggingface_logits
    from megatron_kd.models.huggingface.safetensors import SafetensorsFolder

    make_model(folder / "theirs", name, seed=seed)
    wanted = huggingface_logits(folder / "theirs", tokens)
    torch.save(wanted, folder / "wanted.pt")
    written = write_checkpoint(
        folder / "ours", open_huggingface(folder / "theirs", vocab_size_multiple=8), tokenizer=None
    )
    write_huggingface(
        folder / "back",
        written,
        read_info(written, what="test"),
        max_positions=256,
        shard_bytes=20_000,
    )
    one, other = (SafetensorsFolder(folder / side, what="test") for side in ("theirs", "back"))
    same = one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(one.read(key), other.read(key)) for key in one.tensors
    )
    again = float((huggingface_logits(folder / "back", tokens) - wanted).abs().max())
    return Found({}, float(wanted.abs().max()), same, again)


def _difference(folder: Path, groups: Any, parallel: Any, tokens: torch.Tensor) -> float:
    """Largest difference of our logits from transformers' on any rank that has them."""
    from megatron_kd.checkpoint.store import find_checkpoint, read_info
    from megatron_kd.inference.frozen_model import FrozenModel, KeyValueCache
    from megatron_kd.planning.parameters import rank_parameters

    checkpoint = find_checkpoint(folder / "ours", what="test")
    info = read_info(checkpoint, what="test")
    model = FrozenModel(
        checkpoint, info, groups, parallel, precision="fp32", sequence_length=TOKENS
    )
    place = {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "stage": groups.pipeline_rank,
    }
    assert sum(weight.numel() for weight in model.chunk.parameters()) == rank_parameters(
        info.model_section(), VOCAB, **place
    ), folder
    hidden = model.hidden(tokens)
    # The same once more with a key/value cache: most tokens at once, the last ones one by one.
    cache = KeyValueCache(len(tokens), TOKENS)
    continued = [model.hidden(tokens[:, :CACHED], 0, cache)]
    continued += [
        model.hidden(tokens[:, place : place + 1], place, cache) for place in range(CACHED, TOKENS)
    ]
    worst = torch.tensor(0.0)
    if hidden is not None:
        wanted = torch.load(folder / "wanted.pt", weights_only=True)
        one, other = (model.logits(each).transpose(0, 1) for each in (hidden, torch.cat(continued)))
        worst = torch.max((one - wanted).abs().max(), (other - wanted[:, CACHED - 1 :]).abs().max())
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)
