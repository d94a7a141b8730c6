"""Llama 3.1's scaling of the rotary position embedding.

megatron-core 0.16.1 knows it with three of its four numbers fixed (8192 tokens, factors 1 and 4), which are Llama 3.1's and 3.2's
own; here all four are the model's.
"""

from __future__ import annotations

import math

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_kd.config import ModelSection


def scaled_frequencies(model: ModelSection, head_dim: int) -> Tensor:
    """Angle per position of each rotated pair, fp32 [head_dim / 2], radians.

    With w the wavelength (2 pi / frequency, tokens) and L = rope_original_length: short ones (w < L / high) stay, long ones
    (w > L / low) are divided by the factor, and between them the share of the unscaled frequency grows linearly in 1 / w.
    Source: the Llama 3 reference code (models/llama3, `apply_scaling`), as in transformers' rope type "llama3".
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.int64).float()
    frequencies = 1.0 / (model.rope_base ** (pairs / head_dim))
    if model.rope_scaling_factor == 1.0:
        return frequencies
    low, high = model.rope_low_frequency_factor, model.rope_high_frequency_factor
    turns = model.rope_original_length * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / model.rope_scaling_factor


def scale_rotary(chunk: GPTModel, model: ModelSection) -> None:
    """Give `chunk` the model's frequencies where they are scaled; every pipeline stage has its own copy."""
    if model.rope_scaling_factor != 1.0:
        rotary = chunk.rotary_pos_emb
        rotary.inv_freq = scaled_frequencies(model, chunk.config.kv_channels).to(
            rotary.inv_freq.device
        )
