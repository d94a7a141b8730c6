"""FLOPs and parameters of a decoder, and the peaks of devices."""

from __future__ import annotations

import pytest

from megatron_kd.config.sections import ModelSection
from megatron_kd.planning.flops import flops_per_token, peak_tflops
from megatron_kd.planning.parameters import parameter_count


def section(**changes) -> ModelSection:
    fields = {
        "hidden_size": 48,
        "num_layers": 3,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "head_dim": 16,
        "ffn_hidden_size": 80,
    }
    return ModelSection(**(fields | changes))


def test_flops_are_those_of_the_matrix_products() -> None:
    sequence, vocab = 32, 97
    query, key_value, output, gate_up, down = (
        (48, 6 * 16),
        (48, 2 * 16),
        (6 * 16, 48),
        (48, 80),
        (80, 48),
    )
    layer = [query, key_value, key_value, output, gate_up, gate_up, down]
    matrices = [*layer * 3, (48, vocab)]
    products = sum(2 * sequence * rows * columns for rows, columns in matrices)
    # Scores and values: six heads, every query against every key; a causal model needs half.
    attention = 3 * 6 * (2 * sequence * sequence * 16 + 2 * sequence * 16 * sequence) / 2
    expected = (products + attention) / sequence
    assert flops_per_token(section(), vocab, sequence, forward_only=True) == expected
    assert flops_per_token(section(), vocab, sequence) == 3 * expected


def test_default_heads_and_groups() -> None:
    implicit = section(num_query_groups=None, head_dim=None)
    explicit = section(num_query_groups=6, head_dim=8)
    assert flops_per_token(implicit, 97, 32) == flops_per_token(explicit, 97, 32)
    assert parameter_count(implicit, 97) == parameter_count(explicit, 97)


LLAMA_2_7B = section(
    hidden_size=4096,
    num_layers=32,
    num_attention_heads=32,
    num_query_groups=32,
    head_dim=128,
    ffn_hidden_size=11008,
)
LLAMA_3_8B = section(
    hidden_size=4096,
    num_layers=32,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    ffn_hidden_size=14336,
)
QWEN_3_600M = section(
    hidden_size=1024,
    num_layers=28,
    num_attention_heads=16,
    num_query_groups=8,
    head_dim=128,
    ffn_hidden_size=3072,
    tied_embeddings=True,
    qk_norm=True,
)
QWEN_2_500M = section(
    hidden_size=896,
    num_layers=24,
    num_attention_heads=14,
    num_query_groups=2,
    head_dim=64,
    ffn_hidden_size=4864,
    tied_embeddings=True,
    qkv_bias=True,
)


@pytest.mark.parametrize(
    ("model", "vocab_size", "released"),
    [
        (LLAMA_2_7B, 32000, 6_738_415_616),
        (LLAMA_3_8B, 128256, 8_030_261_248),
        (QWEN_3_600M, 151936, 596_049_920),
        (QWEN_2_500M, 151936, 494_032_768),
    ],
    ids=["Llama 2 7B", "Llama 3 8B", "Qwen3 0.6B", "Qwen2.5 0.5B"],
)
def test_parameters_of_released_checkpoints(
    model: ModelSection, vocab_size: int, released: int
) -> None:
    assert parameter_count(model, vocab_size) == released


PEAKS = {
    312: ["NVIDIA A100-SXM4-80GB", "NVIDIA A100-PCIE-40GB"],
    989: ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB"],
    756: ["NVIDIA H100 PCIe"],
    835: ["NVIDIA H100 NVL", "NVIDIA H200 NVL"],
    148: ["NVIDIA H20"],
    2250: ["NVIDIA B200"],
    2500: ["NVIDIA GB200"],
    121: ["NVIDIA L4"],
    362: ["NVIDIA L40S"],
    None: ["NVIDIA A10G", "NVIDIA RTX A4000", "Tesla T4", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"],
}


@pytest.mark.parametrize(
    ("name", "peak"), [(name, peak) for peak, names in PEAKS.items() for name in names]
)
def test_peak_by_name(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak
