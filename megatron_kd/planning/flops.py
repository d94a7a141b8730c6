"""Count the model FLOPs of a decoder and look up the peak rate of a device.

MFU is the model FLOP/s that one device achieves, divided by its peak. Model FLOPs are those that
the mathematics needs: recomputed activations, padding ids of the vocabulary and the optimizer's
arithmetic do not count, so that wasted work lowers MFU.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from megatron_kd.config.hidden_state_pairs import Projection
from megatron_kd.config.sections import ModelSection
from megatron_kd.planning.parameters import layer_matrix_entries, query_width


def flops_per_token(
    model: ModelSection, vocab_size: int, sequence_length: int, *, forward_only: bool = False
) -> float:
    """Return the model FLOPs of one token, over all devices together.

    One multiply-add is 2 FLOPs. Training costs 3 forward passes, because the backward pass of a
    matrix product is two products. The count includes the query, key, value and output
    projections (grouped queries, head_dim), the three SwiGLU matrices, the two attention products
    and the output head. It leaves out the embedding lookup, norms, softmax, rotary embedding, and
    fields passed through `model.mcore`. Attention is causal: a query sees sequence_length / 2
    keys on average (exactly (sequence_length + 1) / 2). Packed documents are not masked from each
    other.

    Args:
        model: shape of the student, or of a teacher.
        vocab_size: true vocabulary size, without padding.
        sequence_length: tokens per sequence.
        forward_only: count 1 forward pass, for a frozen teacher or an evaluation.
    """
    attended_keys = sequence_length / 2
    attention_products = 2 * model.num_layers * query_width(model) * attended_keys
    matrices = model.num_layers * layer_matrix_entries(model)
    head = model.hidden_size * vocab_size
    forward = 2.0 * (matrices + attention_products + head)
    return forward if forward_only else 3 * forward


def projection_flops_per_token(model: ModelSection, projections: Iterable[Projection]) -> float:
    """Return the FLOPs of one token in the projections to a teacher's width, with backward."""
    return sum(6.0 * model.hidden_size * projection.teacher_width for projection in projections)


# Dense bf16 peaks with fp32 accumulation, 1e12 FLOP/s, from the vendors' data sheets (NVIDIA: half
# of the figure "with sparsity"). The first match wins, so a variant stands before its family. Names
# are matched as whole words.
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
    """Return the dense bf16 peak of a GPU in 1e12 FLOP/s, or None where it is not known.

    Args:
        device_name: the CUDA or ROCm device name. A MIG slice carries the name of the whole GPU,
            and no data sheet states its share, so its peak is None.
    """
    name = device_name.upper()
    if re.search(r"\bMIG\b", name):
        return None
    for pattern, peak in _PEAKS:
        if re.search(rf"(?<![A-Z0-9])(?:{pattern})(?![A-Z0-9])", name):
            return peak
    return None
