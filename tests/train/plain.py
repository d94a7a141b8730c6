"""Implement the GPT and its optimizer in plain torch, as a reference for the engine."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from megatron_kd.config import ModelSection
from megatron_kd.targets import SparseTarget

VOCABULARY_WEIGHTS = ("embedding.word_embeddings.weight", "output_layer.weight")


def plain_logits(
    weights: dict[str, Tensor],
    model: ModelSection,
    tokens: Tensor,
    layers: list[Tensor] | None = None,
) -> Tensor:
    """Return the logits [B, S, vocab_size].

    Args:
        weights: Unsharded weights under their checkpoint names.
        model: Sizes of the model.
        tokens: Token ids [B, S].
        layers: Receives the output [B, S, H] of each layer, if set.
    """
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    size = model.head_dim or model.hidden_size // heads
    x = weights["embedding.word_embeddings.weight"][tokens]
    for layer in range(model.num_layers):
        w = {
            name.removeprefix("decoder.layers."): value[layer]
            for name, value in weights.items()
            if name.startswith("decoder.layers.")
        }
        y = rms_norm(
            x, x.shape[-1:], w["self_attention.linear_qkv.layer_norm_weight"], model.norm_eps
        )
        qkv = (y @ w["self_attention.linear_qkv.weight"].T).unflatten(
            -1, (groups, heads // groups + 2, size)
        )
        q, k, v = qkv.split([heads // groups, 1, 1], dim=3)
        q, k, v = (t.flatten(2, 3).transpose(1, 2) for t in (q, k, v))
        q, k = rotate(q, model.rope_base), rotate(k, model.rope_base)
        k, v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
        context = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + context @ w["self_attention.linear_proj.weight"].T
        y = rms_norm(x, x.shape[-1:], w["mlp.linear_fc1.layer_norm_weight"], model.norm_eps)
        gate, up = (y @ w["mlp.linear_fc1.weight"].T).chunk(2, -1)
        x = x + (silu(gate) * up) @ w["mlp.linear_fc2.weight"].T
        if layers is not None:
            layers.append(x)
    x = rms_norm(x, x.shape[-1:], weights["decoder.final_layernorm.weight"], model.norm_eps)
    return x @ weights["output_layer.weight"][: model.vocab_size].T


def rotate(x: Tensor, base: float) -> Tensor:
    """Apply the rotary position embedding to [B, h, S, d], halves paired (arXiv 2104.09864)."""
    half = x.shape[-1] // 2
    angles = torch.outer(
        torch.arange(x.shape[-2], dtype=x.dtype),
        base ** (-torch.arange(half, dtype=x.dtype) / half),
    )
    one, two = x[..., :half], x[..., half:]
    return torch.cat(
        [one * angles.cos() - two * angles.sin(), two * angles.cos() + one * angles.sin()], -1
    )


def plain_adamw(
    weights: dict[str, Tensor], *, weight_decay: float, lr: float, eps: float
) -> torch.optim.AdamW:
    """Return AdamW with the run's defaults. Weights of norms are not decayed."""
    norms = [value for name, value in weights.items() if "norm" in name]
    others = [value for name, value in weights.items() if "norm" not in name]
    groups = [
        {"params": others, "weight_decay": weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=eps)


def double_target(target: SparseTarget) -> SparseTarget:
    """Return a target with tensors [B, S, ...] in fp64, from the engine's [S, B, ...]."""
    return target.map(
        lambda t: t.transpose(0, 1).double() if t.is_floating_point() else t.transpose(0, 1)
    )


def update(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Apply the gradients with the learning rate of the step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()


def check_weights(
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    weights: dict[str, Tensor],
    vocab_size: int,
) -> None:
    """Check the engine's updated weights against plain torch, relative to the largest update.

    Args:
        before: The engine's initial weights.
        after: The engine's weights after the last step.
        weights: The weights of plain torch after the last step.
        vocab_size: Number of ids. Rows that only pad the vocabulary are not compared.
    """
    for name, value in weights.items():
        rows = slice(0, vocab_size) if name in VOCABULARY_WEIGHTS else slice(None)
        difference = float((after[name][rows] - value.detach()[rows]).abs().max())
        largest_update = float((after[name][rows] - before[name][rows]).abs().max())
        assert difference <= 2e-3 * largest_update, (name, difference, largest_update)
