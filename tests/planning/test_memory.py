"""Memory of a rank, counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_kd.head.sizes import chunk_size
from megatron_kd.planning.head_memory import chunk_tokens
from megatron_kd.planning.memory import PARTS, peak_rank, run_memory
from megatron_kd.planning.shape import microbatches_in_flight
from tests.planning.cases import TEACHER, planned_run


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize(("vocab_size", "tokens"), [(1000, 5000), (32000, 8192), (200_000, 16384)])
def test_chunks_are_those_of_the_head(device: str, vocab_size: int, tokens: int) -> None:
    run = planned_run(
        batch={"micro_batch_size": 1, "sequence_length": tokens},
        model={"vocab_size": vocab_size},
        device=device,
    )
    run = replace(run, vocab_size=vocab_size)
    expected = chunk_size(None, vocab_size, tokens, on_cuda=device == "cuda")
    assert chunk_tokens(run, run.student_shape) == expected


def test_states_by_hand() -> None:
    """bf16: 2 bytes of weight, 4 of gradient, 12 of main weight and moments.

    ZeRO-1 shares the last over the data-parallel ranks.
    """
    (replicated,) = run_memory(planned_run(), 8)
    (sharded,) = run_memory(planned_run(optimizer={"distributed": True}), 8)
    count = replicated.parts["weights"] / 2
    layer = 512 * (2 * 512 + 2 * 256) + 3 * 512 * 1536 + 2 * 512
    assert count == 8 * layer + 2 * 32000 * 512 + 512
    assert replicated.parameters == count
    assert replicated.parts["gradients"] == 4 * count
    assert replicated.parts["optimizer"] == 12 * count
    assert sharded.parts["optimizer"] == 12 * count / 8
    assert replicated.total == sum(replicated.parts.values())
    assert set(replicated.parts) == set(PARTS)


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"recompute": "full"}},
        {"parallel": {"tensor": 2}},
        {"batch": {"micro_batch_size": 4}},
    ],
)
def test_settings_that_save_activations(sections: dict) -> None:
    base = peak_rank(run_memory(planned_run(batch={"micro_batch_size": 8}), 8))
    merged = {"batch": {"micro_batch_size": 8}, **sections}
    saving = peak_rank(run_memory(planned_run(**merged), 8))
    assert saving.parts["activations"] < 0.7 * base.parts["activations"]


def test_sequence_parallelism_saves_activations() -> None:
    split, replicated = (
        run_memory(planned_run(parallel={"tensor": 2, "sequence_parallel": is_split}), 8)[0]
        for is_split in (True, False)
    )
    assert split.parts["activations"] < replicated.parts["activations"]


def test_microbatches_in_flight() -> None:
    """1F1B: the first of four stages holds four; interleaved: megatron-core's warm-up and one."""
    assert [microbatches_in_flight(4, 1, stage, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert [microbatches_in_flight(4, 2, stage, 16) for stage in range(4)] == [11, 9, 7, 5]
    # Never more than there are.
    assert microbatches_in_flight(8, 1, 0, 2) == 2


def test_hidden_states_are_part_of_the_peak() -> None:
    pair = {"student_layer": 2, "teacher_layer": 3, "weight": 1.0}
    online = {"source": "online", "checkpoint": "none"}
    distill = {"top_k": 16, "tail": "bucket"}
    plain, with_pair = (
        run_memory(
            planned_run(
                teacher_shape=TEACHER, teacher=online, distill={**distill, "hidden_states": pairs}
            ),
            8,
        )[0]
        for pairs in ([], [pair])
    )
    microbatches, tokens = 64 // 8 // 2, 2 * 1024
    assert plain.parts["hidden states"] == 0
    assert with_pair.parts["hidden states"] == tokens * (microbatches * 1024 + 512) * 2
    assert with_pair.parameters - plain.parameters == 512 * 1024
    assert with_pair.total > plain.total + with_pair.parts["hidden states"]
