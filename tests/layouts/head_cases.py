"""Make the cases of the head that ranks run and tests judge."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_kd.targets import (
    SampleSelection,
    Selection,
    SparseTarget,
    TopSelection,
)
from tests.losses.cases import TAILS, Problem, extreme_problem, hand_target, make_problem
from tests.losses.divergence_cases import (
    DENSE_ONLY,
    DIVERGENCES,
    DenseProblem,
    dense_problem,
)

SIZES = (2, 4)
SEQUENCE, BATCH, CHUNK = 20, 2, 23
CHUNKS = 2


class LossCase(NamedTuple):
    label: str
    problem: Problem
    target: SparseTarget
    upstream: Tensor
    dtype: torch.dtype
    limit: float
    scalars: dict[str, Any]
    schedule: str


class DivergenceCase(NamedTuple):
    label: str
    dense: DenseProblem
    target: SparseTarget | None  # None: against the whole teacher
    name: str
    upstream: Tensor
    dtype: torch.dtype
    limit: float
    scalars: dict[str, Any]
    schedule: str


class SelectionCase(NamedTuple):
    label: str
    problem: Problem
    selection: Selection


def in_lines(tensor: Tensor) -> Tensor:
    return tensor.reshape(SEQUENCE, BATCH, *tensor.shape[1:])


def problems(size: int, seed: int) -> dict[str, Problem]:
    """Return vocabularies that do not divide by the number of ranks.

    In one the last rank's shard is partly padding, in the other entirely.
    """
    return {
        "uneven": make_problem(seed, vocab_size=90, rows=92),
        "empty shard": make_problem(seed, vocab_size={2: 46, 4: 60}[size], rows=92),
    }


def loss_cases(size: int, seed: int) -> list[LossCase]:
    """Return every tail and temperature in fp64 and fp32, then logits of +-1e4.

    The memory strategies take turns.
    """
    cases, turns = [], cycle(("recompute", "chunk", "save"))
    for (name, problem), temperature, tail in product(
        problems(size, seed).items(), (1.0, 2.0), TAILS
    ):
        scalars = dict(
            alpha=0.6, temperature=temperature, temperature_squared=True, tail=tail, z_loss=1e-2
        )
        for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            schedule = next(turns)
            exact = problem.rounded_to(dtype)
            target = hand_target(problem.teacher, top_k=8, temperature=temperature, dtype=dtype)
            upstream = (
                torch.full_like(exact.upstream, 0.37) if schedule == "chunk" else exact.upstream
            )
            label = f"{name} {schedule} {dtype} {temperature} {tail}"
            cases.append(LossCase(label, exact, target, upstream, dtype, limit, scalars, schedule))
    extreme = extreme_problem(seed, top_k=8)
    for temperature, tail in product((1.0, 2.0), ("renormalize", "bucket")):
        target = hand_target(
            extreme.teacher, top_k=8, temperature=temperature, dtype=torch.float32, ragged=False
        )
        scalars = dict(alpha=1.0, temperature=temperature, tail=tail)
        label = f"1e4 {temperature} {tail}"
        cases.append(
            LossCase(
                label,
                extreme,
                target,
                torch.ones_like(extreme.upstream),
                torch.float32,
                1e-5,
                scalars,
                "chunk",
            )
        )
    return cases


def selection_cases(size: int, seed: int) -> list[SelectionCase]:
    """Return selections of top_k ids and of random samples.

    top_k lies within a shard, beyond it (23 rows a rank) or is the vocabulary; some rows have equal
    logits.
    """
    cases = []
    for name, problem in problems(size, seed).items():
        tied = replace(problem, weight=problem.weight.round(), hidden=problem.hidden.sign())
        full = problem.vocab_size
        kinds = (
            (8, 1.0, 2.0),
            (8, 0.5, 1.0),
            (40, 1.0, 1.0),
            (40, 0.9, 2.0),
            (full, 1.0, 1.0),
            (full, 0.9, 2.0),
        )
        for top_k, top_p, temperature in kinds:
            selection = TopSelection(top_k, top_p=top_p, min_k=2, temperature=temperature)
            cases.append(SelectionCase(f"{name} {selection}", problem, selection))
        cases += [
            SelectionCase(f"{name} draws {t}", problem, SampleSelection(40, seed, temperature=t))
            for t in (1.0, 2.0)
        ]
        cases += [SelectionCase(f"tied {name} {k}", tied, TopSelection(k)) for k in (8, 40, full)]
    return cases


def divergence_cases(size: int, seed: int) -> list[DivergenceCase]:
    """Return every divergence against a dense teacher and against a sparse target.

    Vocabularies, types and memory strategies take turns.
    """
    cases = []
    small_vocab = {2: 46, 4: 60}[size]
    vocabularies, schedules = (
        cycle((90, small_vocab, small_vocab, 90)),
        cycle(("save", "chunk", "save", "save", "chunk")),
    )
    types = cycle(((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float64, 1e-12)))
    for name, sparse in product(DIVERGENCES, (False, True)):
        vocab_size, schedule, (dtype, limit) = next(vocabularies), next(schedules), next(types)
        if sparse and name in DENSE_ONLY:
            continue
        dense = dense_problem(seed, dtype, vocab_size=vocab_size, rows=92)
        target = (
            hand_target(dense.problem.teacher, top_k=8, temperature=2.0, dtype=dtype)
            if sparse
            else None
        )
        upstream = (
            torch.full_like(dense.problem.upstream, 0.37)
            if schedule == "chunk"
            else dense.problem.upstream
        )
        scalars = dict(
            alpha=0.6, temperature=2.0, temperature_squared=True, tail="bucket", z_loss=1e-2
        )
        label = f"{name} {'sparse' if sparse else 'dense'} {vocab_size} {schedule} {dtype}"
        cases.append(
            DivergenceCase(label, dense, target, name, upstream, dtype, limit, scalars, schedule)
        )
    return cases


def grid_cases(size: int, seed: int) -> list[LossCase]:
    """Return every tail x temperature x alpha x memory strategy, in fp32."""
    cases = []
    exact = problems(size, seed)["uneven"].rounded_to(torch.float32)
    upstream = {
        "chunk": torch.full_like(exact.upstream, 0.37),
        "direct": torch.ones_like(exact.upstream),
    }
    for temperature, tail, alpha in product((1.0, 2.0), TAILS, (0.0, 0.5, 1.0)):
        target = hand_target(exact.teacher, top_k=8, temperature=temperature, dtype=torch.float32)
        scalars = dict(alpha=alpha, temperature=temperature, tail=tail, z_loss=1e-2)
        for schedule in ("save", "chunk", "direct", "recompute"):
            label = f"{schedule} {temperature} {tail} {alpha}"
            upstream_of_case = upstream.get(schedule, exact.upstream)
            cases.append(
                LossCase(
                    label, exact, target, upstream_of_case, torch.float32, 1e-5, scalars, schedule
                )
            )
    return cases


def default_chunks_problem(size: int, seed: int) -> Problem:
    """Return 160 tokens, more than the smallest chunk of 64, and a last rank of padding only."""
    return make_problem(seed, tokens=160, vocab_size={2: 46, 4: 60}[size], rows=92)
