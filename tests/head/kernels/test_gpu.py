"""Test the kernels on a GPU at the sizes of real vocabularies, exactly or against fp64."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from megatron_kd.head.logit_rows import GradientTerms, PlainRows, chunk_rows
from megatron_kd.head.sizes import buffer_width
from megatron_kd.head.triton_rows import TritonRows
from megatron_kd.targets import TopSelection, linear_targets
from tests.losses.cases import (
    TAILS,
    Outcome,
    Problem,
    errors,
    fresh_seed,
    hand_target,
    head_outcome,
    make_problem,
    reference_outcome,
    say,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
V = 128256
UPSTREAM = {"chunk": 0.37, "direct": 1.0}


def new_rows(seed: int, tokens: int, valid: int = V) -> Tensor:
    """Return logits [C, W] on the GPU as a product of bf16 leaves them.

    They are multiples of 1/64, so that rows have ties.
    """
    generator = torch.Generator("cuda").manual_seed(seed)
    buffer = torch.empty((tokens, buffer_width(valid)), device="cuda").normal_(generator=generator)
    return buffer.mul_(3 * 64).round_().div_(64)


def new_ids(seed: int, tokens: int, count: int, valid: int = V) -> tuple[Tensor, Tensor]:
    """Return columns [C, K] that differ within a row, some of other ranks, and labels [C].

    On every other row the label is one of the columns.
    """
    generator = torch.Generator("cuda").manual_seed(seed + 1)
    start = torch.randint(0, valid, (tokens, 1), device="cuda", generator=generator)
    columns = (start + 7 * torch.arange(count, device="cuda")) % valid
    columns[:, 5::9] = valid
    label = torch.randint(0, valid, (tokens,), device="cuda", generator=generator)
    return columns, label.where(torch.arange(tokens, device="cuda") % 2 == 0, columns[:, 0])


def gradient_terms(
    seed: int, packed: Tensor, columns: Tensor, label: Tensor, temperature: float
) -> GradientTerms:
    """Return random terms with the shift that `split` returned in `packed`."""
    generator = torch.Generator("cuda").manual_seed(seed + 2)
    scale, scale_t, constant, value = torch.randn(
        (4, len(packed)), device="cuda", generator=generator
    )
    support = torch.randn(columns.shape, device="cuda", generator=generator)
    return GradientTerms(
        shift=packed[:, 0].contiguous(),
        scale=scale,
        scale_t=scale_t,
        constant=1e-3 * constant,
        temperature=temperature,
        columns=columns,
        support=support,
        label=label,
        label_value=value,
    )


def wide(part: slice, terms: GradientTerms) -> GradientTerms:
    """Return the terms of some rows in fp64."""
    tensors = {
        name: value[part].double() if value.is_floating_point() else value[part]
        for name, value in vars(terms).items()
        if isinstance(value, Tensor)
    }
    return replace(terms, **tensors)


@pytest.mark.parametrize(("tokens", "count"), [(2048, 64), (2048, 256), (16800, 64)])
def test_rows_of_a_real_vocabulary(tokens: int, count: int) -> None:
    """Check the first and the last rows.

    With 16800 tokens the last rows lie beyond 2^31 logits.
    """
    seed = fresh_seed()
    for temperature in (1.0, 2.0):
        original = new_rows(seed, tokens)
        columns, label = new_ids(seed, tokens, count)
        rows = chunk_rows(original.clone(), V, torch.bfloat16)
        assert type(rows) is TritonRows
        packed = rows.split(columns, label, temperature, total=True, entropy=True)
        terms = gradient_terms(seed, packed, columns, label, temperature)
        gradient = rows.gradient(terms)
        assert gradient.dtype == torch.bfloat16
        assert gradient.data_ptr() == rows.buffer.data_ptr()
        for part in (slice(0, 48), slice(tokens - 48, tokens)):
            exact = PlainRows(original[part].double(), V)
            expected = exact.split(
                columns[part], label[part], temperature, total=True, entropy=True
            )
            assert torch.equal(packed[part, 5:].double(), expected[:, 5:])
            assert torch.equal(packed[part, 0].double(), expected[:, 0])
            size = torch.stack(
                [
                    *expected[:, 1:3].T,
                    original[part, :V].double().abs().sum(1),
                    expected[:, 4].abs(),
                ],
                1,
            )
            error = ((packed[part, 1:5].double() - expected[:, 1:5]).abs() / size).amax().item()
            assert error < 1e-6, say(seed, tokens, count, temperature, error)
            slope = exact.gradient(wide(part, terms))
            error = ((gradient[part].double() - slope).abs() / (slope.abs() + 1e-3)).amax().item()
            assert error < 2**-8, say(seed, tokens, count, temperature, "gradient", error)
        del original, rows, packed, gradient


@pytest.mark.parametrize("count", [1, 64, 256])
def test_top_of_a_real_vocabulary(count: int) -> None:
    seed = fresh_seed()
    original = new_rows(seed, 512)
    values, columns = TritonRows(original.clone(), V).top(count)
    expected, order = original[:, :V].sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, expected[:, :count]), say(seed, count)
    assert torch.equal(columns, order[:, :count]), say(seed, count)


def test_runs_repeat() -> None:
    seed = fresh_seed()

    def run() -> list[Tensor]:
        rows = TritonRows(new_rows(seed, 2048), V, torch.bfloat16)
        columns, label = new_ids(seed, 2048, 64)
        values, top_columns = rows.top(64)
        packed = rows.split(columns, label, 2.0, total=True, entropy=True)
        terms = gradient_terms(seed, packed, columns, label, 2.0)
        return [values, top_columns, packed, rows.gradient(terms)]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), say(seed)


def on_gpu(problem: Problem) -> Problem:
    return replace(
        problem,
        **{
            name: value.cuda() for name, value in vars(problem).items() if isinstance(value, Tensor)
        },
    )


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_the_head(dtype: torch.dtype, limit: float) -> None:
    """Check losses to fp32 and gradients to the weight's type, for every tail and head schedule."""
    seed = fresh_seed()
    problem = make_problem(seed, tokens=200, width=64, vocab_size=1000, rows=1024).rounded_to(dtype)
    problem_on_gpu = on_gpu(problem)
    for tail, temperature, schedule in product(
        TAILS, (1.0, 2.0), ("save", "chunk", "direct", "recompute")
    ):
        target = hand_target(
            problem.teacher, top_k=16, temperature=temperature, dtype=torch.float32
        )
        scalars = dict(alpha=0.5, temperature=temperature, tail=tail, z_loss=1e-2)
        upstream = (
            torch.full_like(problem.upstream, UPSTREAM[schedule])
            if schedule in UPSTREAM
            else problem.upstream
        )
        options = dict(schedule=schedule, chunk_tokens=96, **scalars)
        target_on_gpu = target.map(lambda t: t.cuda())
        outcome = Outcome(
            *(
                t.cpu()
                for t in head_outcome(
                    problem_on_gpu,
                    target_on_gpu,
                    upstream.cuda(),
                    problem_on_gpu.mask.float(),
                    dtype,
                    **options,
                )
            )
        )
        by_name = errors(
            outcome, reference_outcome(problem, target, upstream, problem.mask, **scalars)
        )
        assert max(by_name[name] for name in ("total", "ce", "kd")) < 1e-5, say(
            seed, options, by_name
        )
        assert max(by_name[name] for name in ("hidden", "weight")) < limit, say(
            seed, options, by_name
        )


def test_identical_models_do_not_differ() -> None:
    seed = fresh_seed()
    problem = on_gpu(
        make_problem(seed, tokens=200, width=64, vocab_size=1000, rows=1024).rounded_to(
            torch.bfloat16
        )
    )
    target = linear_targets(
        problem.hidden.bfloat16(),
        problem.weight.bfloat16(),
        TopSelection(16),
        vocab_size=1000,
        chunk_tokens=96,
    )
    outcome = head_outcome(
        problem,
        target,
        torch.ones(200, device="cuda"),
        None,
        torch.bfloat16,
        alpha=1.0,
        tail="bucket",
        chunk_tokens=96,
    )
    assert not outcome.kd.any(), say(seed, outcome.kd)
