"""Test that a dense teacher costs a second chunk of logits, not [tokens, vocabulary]."""

from __future__ import annotations

import pytest
import torch

from megatron_kd.losses import DenseTeacher, linear_divergence
from megatron_kd.losses.dense_loss import BLOCK_CPU
from tests.head.test_head_memory import BLOCKS, FLOAT, H, V
from tests.helpers.allocations import peak_bytes

# What the terms of a block of rows and their derivatives take.
TERMS = 24 * BLOCK_CPU * FLOAT


def dense_peak(divergence: str, tokens: int, chunk_tokens: int, *, gradient: bool = True) -> int:
    hidden, teacher_hidden = torch.randn(2, tokens, H)
    weight, teacher = (
        torch.randn(V, H, requires_grad=True),
        DenseTeacher(teacher_hidden, torch.randn(V, H)),
    )
    labels = torch.randint(0, V, (tokens,))
    options = dict(
        divergence=divergence,
        alpha=0.5,
        temperature=2.0,
        schedule="chunk",
        chunk_tokens=chunk_tokens,
    )

    def step() -> None:
        with torch.set_grad_enabled(gradient):
            loss = linear_divergence(hidden, weight, labels, teacher, **options)  # type: ignore[arg-type]
        if gradient:
            loss.total.sum().backward()

    return peak_bytes(step)


@pytest.mark.parametrize("divergence", ["forward_kl", "alpha_beta", "mse_logits"])
def test_a_chunk_of_each_model_and_the_weight_gradient(divergence: str) -> None:
    small, more_tokens = (dense_peak(divergence, tokens, 32) for tokens in (64, 128))
    assert small < 1.1 * (2 * 32 * V + V * H) * FLOAT + BLOCKS + TERMS, small / FLOAT / V
    assert more_tokens - small < 0.05 * 64 * V * FLOAT, (small, more_tokens)


def test_evaluation_forms_no_gradients() -> None:
    assert (
        dense_peak("reverse_kl", 64, 32, gradient=False) < 1.1 * 2 * 32 * V * FLOAT + BLOCKS + TERMS
    )
