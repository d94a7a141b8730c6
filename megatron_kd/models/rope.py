"""Scale the rotary position embedding as Llama 3.1 does.

megatron-core 0.16.1 fixes three of the four numbers of this scaling to those of Llama 3.1 and 3.2
(8192 tokens, factors 1 and 4). Here all four come from the model section.
"""

from __future__ import annotations

import math

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_kd.config import ModelSection


def scaled_frequencies(model: ModelSection, head_dim: int) -> Tensor:
    """Return the angle per position of each rotated pair, fp32 [head_dim / 2], radians.

    Let w be the wavelength (2 pi / frequency, tokens) and L = rope_original_length. Short
    wavelengths (w < L / rope_high_frequency_factor) stay unchanged. Long ones
    (w > L / rope_low_frequency_factor) have their frequency divided by rope_scaling_factor. In
    between, the share of the unscaled frequency is linear in 1 / w.

    Source: the Llama 3 reference code (models/llama3, `apply_scaling`), as in transformers' rope
    type "llama3".
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.int64).float()
    frequencies = 1.0 / (model.rope_base ** (pairs / head_dim))
    if model.rope_scaling_factor == 1.0:
        return frequencies
    low, high = model.rope_low_frequency_factor, model.rope_high_frequency_factor
    rotations = model.rope_original_length * frequencies / (2 * math.pi)
    unscaled = ((rotations - low) / (high - low)).clamp(0.0, 1.0)
    return unscaled * frequencies + (1.0 - unscaled) * frequencies / model.rope_scaling_factor


def scale_rotary(chunk: GPTModel, model: ModelSection) -> None:
    """Set the model's rotary frequencies in `chunk` if they are scaled.

    Every pipeline stage has its own copy of the frequencies.
    """
    if model.rope_scaling_factor != 1.0:
        rotary = chunk.rotary_pos_emb
        frequencies = scaled_frequencies(model, chunk.config.kv_channels)
        rotary.inv_freq = frequencies.to(rotary.inv_freq.device)
