"""Test the peak memory of the head: it follows the chunk, not tokens x vocabulary.

Peaks come from the allocator's own log.
"""

from __future__ import annotations

import torch

from megatron_kd.head.sizes import BLOCK
from megatron_kd.losses import linear_kd_cross_entropy, reference_kd_cross_entropy
from megatron_kd.targets import TopSelection, linear_targets
from tests.helpers.allocations import most_bytes, peak_bytes

H, V, K = 16, 49152, 8
FLOAT = 4
# What the walk over blocks of rows takes whatever the sizes: a few copies of one block.
BLOCKS = 3 * BLOCK * FLOAT


def head_peak(
    tokens: int, chunk_tokens: int, *, schedule: str = "chunk", temperature: float = 1.0
) -> int:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, H, generator=generator, requires_grad=True)
    weight = torch.randn(V, H, generator=generator, requires_grad=True)
    weight.main_grad = torch.zeros_like(weight) if schedule == "direct" else None
    labels = torch.randint(0, V, (tokens,), generator=generator)
    target = linear_targets(
        hidden, weight, TopSelection(K, temperature=temperature), chunk_tokens=64
    )

    def step() -> None:
        loss = linear_kd_cross_entropy(
            hidden,
            weight,
            labels,
            target,
            alpha=0.5,
            temperature=temperature,
            tail="bucket",
            schedule=schedule,
            chunk_tokens=chunk_tokens,
        )
        loss.total.sum().backward()

    return peak_bytes(step)


def test_the_measure_sees_whole_logits() -> None:
    """Check that the measure sees several [N, V] tensors, which the reference keeps."""
    hidden, weight = torch.randn(256, H), torch.randn(V, H, requires_grad=True)
    labels = torch.zeros(256, dtype=torch.long)
    peak = peak_bytes(
        lambda: (
            reference_kd_cross_entropy(hidden @ weight.T, labels, None, alpha=0.0)
            .total.sum()
            .backward()
        )
    )
    assert peak > 2 * 256 * V * FLOAT


def test_what_another_thread_freed() -> None:
    """Check frees that are missing in the log.

    Such a free is seen when its address is given out again, entirely or in part. A free of an
    unknown block is ignored.
    """
    assert most_bytes([(100, 10), (100, -10), (100, 6), (200, -50), (106, 3)]) == 10
    assert most_bytes([(100, 10), (100, 10), (100, -10), (100, 4)]) == 10
    assert most_bytes([(100, 10), (110, 10), (105, 10), (300, 7)]) == 20
    assert most_bytes([(100, 10), (110, 10), (90, 10), (90, -10), (120, 5)]) == 30


def test_tokens_cost_little_and_chunks_cost_their_logits() -> None:
    all_logits = 256 * V * FLOAT
    for schedule in ("chunk", "recompute"):
        small, more_tokens, more_chunk = (
            head_peak(tokens, chunk, schedule=schedule)
            for tokens, chunk in ((256, 32), (512, 32), (256, 64))
        )
        assert more_tokens - small < 0.05 * all_logits, (schedule, small, more_tokens)
        # One buffer of logits and the gradient of the weight; all else is a small part of that.
        assert small < 1.1 * (32 * V + V * H) * FLOAT + BLOCKS, (schedule, small)
        assert 0.9 * 32 * V * FLOAT < more_chunk - small < 1.2 * 32 * V * FLOAT, (
            schedule,
            small,
            more_chunk,
        )


def test_schedules_cost_what_they_say() -> None:
    """Check the memory of two strategies.

    save: all logits and the weight gradient. direct: one chunk and no weight gradient of its own.
    """
    assert head_peak(256, 32, schedule="save") < 1.1 * (256 * V + V * H) * FLOAT + BLOCKS
    assert head_peak(256, 32, schedule="direct") < 1.1 * 32 * V * FLOAT + BLOCKS


def test_another_temperature_costs_nothing_more() -> None:
    assert head_peak(256, 32, temperature=2.0) < 1.1 * (32 * V + V * H) * FLOAT + BLOCKS


def test_evaluation_forms_no_gradients() -> None:
    hidden, weight = torch.randn(256, H), torch.nn.Parameter(torch.randn(V, H))
    labels = torch.zeros(256, dtype=torch.long)
    with torch.no_grad():
        peak = peak_bytes(
            lambda: linear_kd_cross_entropy(
                hidden, weight, labels, None, alpha=0.0, chunk_tokens=16
            )
        )
    assert peak < 1.1 * 16 * V * FLOAT + BLOCKS


def test_targets_are_chosen_chunk_by_chunk() -> None:
    hidden, weight = torch.randn(512, H), torch.randn(V, H)
    small, large = (
        peak_bytes(
            lambda tokens=tokens: linear_targets(
                hidden[:tokens], weight, TopSelection(K), chunk_tokens=32
            )
        )  # type: ignore[misc]
        for tokens in (256, 512)
    )
    assert large - small < 0.05 * 256 * V * FLOAT, (small, large)
    assert small < 4 * 32 * V * FLOAT, (small, large)
