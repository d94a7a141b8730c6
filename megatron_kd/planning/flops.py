"""Model FLOPs of a Llama-style decoder, its parameters, and the peak rate of a device: what MFU is made of.

MFU = achieved model FLOP/s of one device / its peak. Model FLOPs are those the mathematics needs: recomputed
activations, padding ids of the vocabulary and optimizer arithmetic do not count, so wasted work lowers MFU.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from megatron_kd.config.hidden_state_pairs import Projection
from megatron_kd.config.sections import ModelSection

if TYPE_CHECKING:  # counting needs no torch, and tools that only count start in a second
    import torch


def flops_per_token(
    model: ModelSection, vocab_size: int, sequence_length: int, *, forward_only: bool = False
) -> float:
    """Model FLOPs of one token, over all devices together.

    One multiply-add is 2 FLOPs. Training is 3 forward passes: the backward pass of a matrix product is two products.
    Counted: query/key/value/output projections (grouped queries, head_dim), the three SwiGLU matrices, the two
    attention products, the output head. Not counted: embedding lookup, norms, softmax, rotary embedding, and
    fields passed through `model.mcore`. Attention is causal: a query sees sequence_length / 2 keys on average (exactly
    (sequence_length + 1) / 2; packed documents are not masked from each other).

    Args:
        model: shape of the student, or of a teacher.
        vocab_size: true vocabulary size (ids), without padding.
        sequence_length: tokens per sequence.
        forward_only: a frozen teacher, or evaluation: 1 forward pass.
    """
    attended_keys = sequence_length / 2
    scores_and_values = 2 * model.num_layers * _query_width(model) * attended_keys
    head = model.hidden_size * vocab_size
    forward = 2.0 * (_layer_weights(model) + scores_and_values + head)
    return forward if forward_only else 3 * forward


def projection_flops_per_token(model: ModelSection, projections: Iterable[Projection]) -> float:
    """Model FLOPs of one token in the projections to a teacher's width, forward and backward."""
    return sum(6.0 * model.hidden_size * each.teacher_width for each in projections)


def parameter_count(model: ModelSection, vocab_size: int) -> int:
    """Weights of the model, embeddings included; pass the true vocabulary size to leave padding rows out."""
    hidden, layers = model.hidden_size, model.num_layers
    norms = (2 * layers + 1) * hidden
    if model.qk_norm:
        norms += 2 * layers * _head_dim(model)
    biases = layers * (_query_width(model) + 2 * _key_width(model)) if model.qkv_bias else 0
    embeddings = vocab_size * hidden * (1 if model.tied_embeddings else 2)
    return _layer_weights(model) + norms + biases + embeddings


def _layer_weights(model: ModelSection) -> int:
    """Entries of the matrices of all decoder layers: attention projections and SwiGLU."""
    attention = model.hidden_size * (2 * _query_width(model) + 2 * _key_width(model))
    return model.num_layers * (attention + 3 * model.hidden_size * model.ffn_hidden_size)


def _head_dim(model: ModelSection) -> int:
    return model.head_dim or model.hidden_size // model.num_attention_heads


def _query_width(model: ModelSection) -> int:
    return model.num_attention_heads * _head_dim(model)


def _key_width(model: ModelSection) -> int:
    return (model.num_query_groups or model.num_attention_heads) * _head_dim(model)


# Dense bf16 peaks with fp32 accumulation, 1e12 FLOP/s, from the vendors' data sheets (NVIDIA: half of the figure
# "with sparsity"). First match wins, so a variant stands before its family; a name is matched as whole words.
_PEAKS: tuple[tuple[str, float], ...] = (
    (r"GB[23]00", 2500.0),
    (r"B[23]00", 2250.0),
    (r"H[12]00 NVL", 835.0),
    (r"H100 PCIE", 756.0),
    (r"H100|H200|GH200|H800", 989.0),
    (r"H20", 148.0),
    (r"A100|A800", 312.0),
    (r"A30", 165.0),
    (r"A40", 149.7),
    (r"L40S", 362.0),
    (r"L40", 181.0),
    (r"L4", 121.0),
    (r"MI300X|MI325X", 1307.0),
)


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU by its CUDA/ROCm device name, 1e12 FLOP/s; None where it is not known.

    A MIG slice carries the name of the whole GPU and is None: its share is not in the name's data sheet.
    """
    name = device_name.upper()
    if re.search(r"\bMIG\b", name):
        return None
    for pattern, peak in _PEAKS:
        if re.search(rf"(?<![A-Z0-9])(?:{pattern})(?![A-Z0-9])", name):
            return peak
    return None


def measure_peak_tflops(dtype: torch.dtype, *, seconds: float = 0.2) -> float:
    """Time square matrix products on the CPU and return the best rate, 1e12 FLOP/s.

    A CPU has no data-sheet figure that holds for its thread count, so the yardstick is the best product that this
    process gets with its present number of threads. Takes about `seconds`; other processes' load lowers the result.
    """
    import torch

    size, best = 128, 0.0
    deadline = time.perf_counter() + seconds
    while True:
        left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
        torch.mm(left, right)
        start = time.perf_counter()
        torch.mm(left, right)
        elapsed = max(time.perf_counter() - start, 1e-9)
        best = max(best, 2 * size**3 / elapsed / 1e12)
        remaining = deadline - time.perf_counter()
        if remaining <= 0:
            return best
        # A product of twice the size takes eight times as long, and it runs twice: once as warm-up.
        if 16 * elapsed < remaining and size < 8192:
            size *= 2
