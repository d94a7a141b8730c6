"""Test the output head and the selection of targets with Triton rows against the fp64 reference."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_kd.head.output_weight import OutputWeight
from megatron_kd.head.triton_rows import TritonRows
from megatron_kd.targets import SampleSelection, TopSelection, linear_targets, select_targets
from tests.losses.cases import (
    TAILS,
    errors,
    extreme_problem,
    fresh_seed,
    hand_target,
    head_outcome,
    logits_outcome,
    make_problem,
    reference_outcome,
    say,
)
from tests.targets.test_selection import clear_rows, dense_target, difference

pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
    pytest.mark.skipif(
        torch.cuda.is_available(),
        reason="on a GPU the head uses these rows anyway: test_gpu.py",
    ),
]
CALLERS = ("head.output_weight", "head.chunked_head")


class CountedRows:
    """Replace `chunk_rows` and count its calls.

    Where a gradient type is requested, `gradient_dtype` takes its place.
    """

    def __init__(self, gradient_dtype: torch.dtype | None) -> None:
        self.gradient_dtype, self.count = gradient_dtype, 0

    def __call__(
        self, buffer: Tensor, valid: int, gradient_dtype: torch.dtype | None = None
    ) -> TritonRows:
        self.count += 1
        return TritonRows(buffer, valid, gradient_dtype and (self.gradient_dtype or gradient_dtype))


def use_triton(
    monkeypatch: pytest.MonkeyPatch, gradient_dtype: torch.dtype | None = None
) -> CountedRows:
    counted_rows = CountedRows(gradient_dtype)
    for caller in CALLERS:
        monkeypatch.setattr(f"megatron_kd.{caller}.chunk_rows", counted_rows)
    monkeypatch.setattr("megatron_kd.head.sizes.SAVED_LOGITS_CPU", 0)
    return counted_rows


def widen_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Widen the narrow gradient before products, as a GPU does inside.

    A CPU multiplies in fp32 only.
    """
    for name, position in (("hidden_gradient", 0), ("add_weight_gradient_", 1)):
        original = getattr(OutputWeight, name)

        def wide(
            self: OutputWeight,
            *arguments: Any,
            original: Any = original,
            position: int = position,
            **options: Any,
        ) -> Any:
            operands = list(arguments)
            assert operands[position].dtype == torch.bfloat16
            operands[position] = operands[position].to(self.dtype)
            return original(self, *operands, **options)

        monkeypatch.setattr(OutputWeight, name, wide)


@pytest.mark.parametrize("tail", TAILS)
def test_every_tail(tail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = fresh_seed()
    counted_rows = use_triton(monkeypatch)
    problem = make_problem(seed, tokens=8).rounded_to(torch.float32)
    for temperature, schedule in ((1.0, "chunk"), (2.0, "recompute"), (0.7, "save")):
        target = hand_target(problem.teacher, top_k=8, temperature=temperature, dtype=torch.float32)
        scalars = dict(
            alpha=0.6, temperature=temperature, temperature_squared=True, tail=tail, z_loss=1e-2
        )
        upstream = (
            torch.full_like(problem.upstream, 0.37) if schedule == "chunk" else problem.upstream
        )
        options = dict(schedule=schedule, chunk_tokens=5)
        outcome = head_outcome(
            problem, target, upstream, problem.mask.float(), **options, **scalars
        )
        by_name = errors(
            outcome, reference_outcome(problem, target, upstream, problem.mask, **scalars)
        )
        assert max(by_name.values()) < 1e-5, say(seed, options, scalars, by_name)
    assert counted_rows.count >= 8


def test_two_byte_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that every head schedule finds its gradients over its logits.

    That is chunk by chunk, kept, and in slabs of the vocabulary.
    """
    seed = fresh_seed()
    use_triton(monkeypatch, torch.bfloat16)
    widen_gradients(monkeypatch)
    problem = make_problem(seed, tokens=8).rounded_to(torch.float32)
    target = hand_target(problem.teacher, top_k=8, dtype=torch.float32)
    scalars = dict(alpha=0.6, tail="bucket", z_loss=1e-2)
    for schedule, chunk_tokens in (("chunk", 5), ("save", 5), ("recompute", 5), ("recompute", 3)):
        upstream = (
            torch.full_like(problem.upstream, 0.37) if schedule == "chunk" else problem.upstream
        )
        options = dict(schedule=schedule, chunk_tokens=chunk_tokens)
        outcome = head_outcome(
            problem, target, upstream, problem.mask.float(), **options, **scalars
        )
        by_name = errors(
            outcome, reference_outcome(problem, target, upstream, problem.mask, **scalars)
        )
        assert max(by_name[name] for name in ("total", "ce", "kd")) < 1e-5, say(
            seed, options, by_name
        )
        # The interpreter cuts bf16 off where a GPU rounds: twice the error, and all to one side.
        assert max(by_name[name] for name in ("hidden", "weight")) < 2**-7, say(
            seed, options, by_name
        )


def test_logits_of_ten_thousand_and_existing_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = fresh_seed()
    use_triton(monkeypatch)
    problem = extreme_problem(seed, top_k=8)
    some = torch.arange(0, 40, 5)
    problem = type(problem)(
        seed,
        *(
            getattr(problem, n)[some] if n != "weight" else problem.weight
            for n in vars(problem)
            if n != "seed"
        ),
    )
    for (tail, temperature), run in product(
        (("bucket", 2.0), ("uniform", 1.0)), (head_outcome, logits_outcome)
    ):
        target = hand_target(
            problem.teacher, top_k=8, temperature=temperature, dtype=torch.float32, ragged=False
        )
        scalars = dict(alpha=0.5, temperature=temperature, tail=tail)
        outcome = run(problem, target, problem.upstream, problem.mask.float(), **scalars)
        by_name = errors(
            outcome, reference_outcome(problem, target, problem.upstream, problem.mask, **scalars)
        )
        assert max(by_name.values()) < 1e-5, say(seed, run, scalars, by_name)


def test_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check top-k with and without top_p, and that samples equal those of plain torch."""
    seed = fresh_seed()
    problem = make_problem(seed, tokens=6)
    logits = problem.teacher.float()
    draws = SampleSelection(16, seed, temperature=2.0)
    expected = select_targets(logits, draws)
    counted_rows = use_triton(monkeypatch)
    for top_p, temperature in ((1.0, 1.0), (0.9, 2.0)):
        clear = clear_rows(
            logits, top_p=top_p if top_p < 1.0 else 2.0, temperature=temperature, gap=1e-6
        )
        target = select_targets(
            logits[clear], TopSelection(8, top_p=top_p, temperature=temperature)
        )
        error = difference(
            target, dense_target(logits[clear], 8, top_p=top_p, temperature=temperature)
        )
        assert error < 5e-6, say(seed, top_p, error)
    target = select_targets(logits, draws)
    assert torch.equal(target.indices, expected.indices), say(seed)
    assert torch.equal(target.logprobs, expected.logprobs), say(seed)
    assert counted_rows.count == 3


def test_identical_models_do_not_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the divergence of identical models is zero and not only small.

    The teacher's one pass and the student's give the same bits.
    """
    seed = fresh_seed()
    use_triton(monkeypatch)
    problem = make_problem(seed, tokens=8).rounded_to(torch.float32)
    target = linear_targets(
        problem.hidden.float(), problem.weight.float(), TopSelection(8), vocab_size=90
    )
    outcome = head_outcome(problem, target, torch.ones(8), None, alpha=1.0, tail="bucket")
    assert not outcome.kd.any(), say(seed, outcome.kd)
    assert not outcome.total.any(), say(seed, outcome.kd)
    assert outcome.hidden.abs().max() < 1e-6, say(seed, outcome.hidden)
