"""Test head, loss of existing logits and targets over tensor-parallel groups, on gloo."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_kd.losses import reference_kd_cross_entropy
from megatron_kd.targets import SparseTarget, TopSelection, select_targets
from tests.helpers.ranks import run_ranks
from tests.layouts.head_cases import (
    CHUNKS,
    SIZES,
    DivergenceCase,
    LossCase,
    default_chunks_problem,
    divergence_cases,
    loss_cases,
    selection_cases,
)
from tests.layouts.head_ranks import COLLECTIVES, Findings, run_everything
from tests.losses.cases import (
    Outcome,
    errors,
    fresh_seed,
    oracle_outcome,
    reference_outcome,
    relative_error,
    say,
)
from tests.losses.divergence_cases import DIVERGENCES, kept_ids, plain_outcome

pytestmark = pytest.mark.dist


class Layout(NamedTuple):
    size: int
    sequence_parallel: bool
    ranks: list[Findings]


class World(NamedTuple):
    seed: int
    results: list[dict[tuple[int, bool], Findings]]

    def layouts(self) -> Iterator[Layout]:
        """Yield each group in turn; of two, both pairs."""
        for size, split in product(SIZES, (False, True)):
            for first_rank in range(0, 4, size):
                yield Layout(
                    size,
                    split,
                    [rank[size, split] for rank in self.results[first_rank : first_rank + size]],
                )


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other
    seed = fresh_seed()
    yield World(seed, run_ranks(run_everything, 4, seed))
    torch.set_num_threads(threads)


def all_equal(tensors: list[Tensor]) -> bool:
    return all(torch.equal(tensor, tensors[0]) for tensor in tensors)


def assembled(outcomes: list[Outcome], *, sequence_parallel: bool) -> Outcome:
    """Return one rank's losses with the gradients of all ranks joined.

    The gradient of hidden is joined from its slices (or is the first rank's, if all are equal),
    that of the weight from its rows.
    """
    hidden = (
        torch.cat([outcome.hidden for outcome in outcomes])
        if sequence_parallel
        else outcomes[0].hidden
    )
    return outcomes[0]._replace(
        hidden=hidden.flatten(0, 1), weight=torch.cat([outcome.weight for outcome in outcomes])
    )


def expected_outcome(case: LossCase) -> Outcome:
    """Return the unsharded outcome in fp64, by plain autograd over whole teacher rows.

    For logits of +-1e4, whose targets are fp32, it comes from the reference.
    """
    run = reference_outcome if case.label.startswith("1e4") else oracle_outcome
    return run(case.problem, case.target, case.upstream, case.problem.mask, **case.scalars)


def test_losses_and_gradients_are_the_unsharded_ones(world: World) -> None:
    """Detect gradients that are off by the group's size, or only a part of a sum."""
    expected = {
        size: [expected_outcome(case) for case in loss_cases(size, world.seed)] for size in SIZES
    }
    for layout in world.layouts():
        for index, case in enumerate(loss_cases(layout.size, world.seed)):
            label = (layout.size, layout.sequence_parallel, case.label)
            outcomes = [rank.losses[index] for rank in layout.ranks]
            for name in ("total", "ce", "kd"):
                assert all_equal([getattr(outcome, name) for outcome in outcomes]), say(
                    world.seed, *label, f"ranks differ in {name}"
                )
            if not layout.sequence_parallel:
                assert all_equal([outcome.hidden for outcome in outcomes]), say(
                    world.seed, *label, "ranks differ in a replicated gradient"
                )
            full = assembled(outcomes, sequence_parallel=layout.sequence_parallel)
            error_by_name = errors(full, expected[layout.size][index])
            assert max(error_by_name.values()) < case.limit, say(world.seed, *label, error_by_name)
            assert not full.weight[case.problem.vocab_size :].any(), say(
                world.seed, *label, "padding rows have a gradient"
            )


def expected_divergence(case: DivergenceCase) -> Outcome:
    problem = case.dense.problem
    is_kept = None if case.target is None else kept_ids(case.target, problem.vocab_size)
    return plain_outcome(
        problem,
        DIVERGENCES[case.name],
        case.upstream,
        problem.mask,
        is_kept=is_kept,
        **case.scalars,
    )


def test_divergences_are_the_unsharded_ones(world: World) -> None:
    """Compare with a dense teacher, sharded like the student, and with sparse targets."""
    expected = {
        size: [expected_divergence(case) for case in divergence_cases(size, world.seed)]
        for size in SIZES
    }
    for layout in world.layouts():
        for index, case in enumerate(divergence_cases(layout.size, world.seed)):
            label = (layout.size, layout.sequence_parallel, case.label)
            outcomes = [rank.divergences[index] for rank in layout.ranks]
            for name in ("total", "ce", "kd"):
                assert all_equal([getattr(outcome, name) for outcome in outcomes]), say(
                    world.seed, *label, f"ranks differ in {name}"
                )
            full = assembled(outcomes, sequence_parallel=layout.sequence_parallel)
            error_by_name = errors(full, expected[layout.size][index])
            assert max(error_by_name.values()) < case.limit, say(world.seed, *label, error_by_name)
            assert not full.weight[case.dense.problem.vocab_size :].any(), say(
                world.seed, *label, "padding rows have a gradient"
            )


def test_existing_logits(world: World) -> None:
    """Join the ranks' columns of the logit gradient and multiply them for the comparison."""
    cases = {
        size: [case for case in loss_cases(size, world.seed) if case.dtype == torch.float64]
        for size in SIZES
    }
    expected = {
        size: [
            oracle_outcome(c.problem, c.target, c.problem.upstream, None, **c.scalars)
            for c in of_size
        ]
        for size, of_size in cases.items()
    }
    for layout in world.layouts():
        for index, case in enumerate(cases[layout.size] if not layout.sequence_parallel else []):
            losses, gradients = zip(
                *(rank.logits_losses[index] for rank in layout.ranks), strict=True
            )
            label = (layout.size, "given logits", case.label)
            assert all(all_equal(list(parts)) for parts in zip(*losses, strict=True)), say(
                world.seed, *label
            )
            gradient, problem = torch.cat(gradients, dim=1), case.problem
            assert not gradient[:, problem.vocab_size :].any(), say(world.seed, *label)
            full = Outcome(*losses[0], gradient @ problem.weight, gradient.T @ problem.hidden)
            error_by_name = errors(full, expected[layout.size][index])
            assert max(error_by_name.values()) < 1e-12, say(world.seed, *label, error_by_name)


def tensors_of(target: SparseTarget) -> list[Tensor]:
    assert target.entropy is not None
    assert (target.log_tail is None) == target.sampled
    return target.tensors()[1:]


def test_targets_are_those_of_whole_rows(world: World) -> None:
    for layout in world.layouts():
        ways = 1 if layout.sequence_parallel else 2
        for index, case in enumerate(selection_cases(layout.size, world.seed)):
            logits = case.problem.hidden @ case.problem.weight.T
            expected = select_targets(logits, case.selection, vocab_size=case.problem.vocab_size)
            for way in range(ways):
                ranks = [rank.targets[index * ways + way] for rank in layout.ranks]
                label = (layout.size, layout.sequence_parallel, way, case.label)
                assert torch.equal(ranks[0].indices, expected.indices), say(world.seed, *label)
                for parts in zip(*([t.indices, *tensors_of(t)] for t in ranks), strict=True):
                    assert all_equal(list(parts)), say(world.seed, *label, "ranks differ")
                for actual, expected_tensor in zip(
                    tensors_of(ranks[0]), tensors_of(expected), strict=True
                ):
                    torch.testing.assert_close(
                        actual,
                        expected_tensor,
                        rtol=0,
                        atol=1e-6,
                        msg=lambda m, label=label: say(world.seed, *label, m),
                    )  # type: ignore[misc]


def test_ranks_cut_alike_whatever_they_hold(world: World) -> None:
    """Cut tokens alike on all ranks.

    Chunks sized by a rank's own rows would differ if the last rank holds padding, and collectives
    would not match.
    """
    for layout in world.layouts():
        problem = default_chunks_problem(layout.size, world.seed)
        target = select_targets(problem.logits(), TopSelection(8))
        expected = reference_kd_cross_entropy(
            problem.logits(), problem.labels, target, alpha=0.5, tail="bucket"
        ).total
        for rank in layout.ranks:
            assert relative_error(rank.default_chunks, expected) < 1e-5, say(
                world.seed, layout.size, layout.sequence_parallel
            )


def test_identical_models_and_repeats(world: World) -> None:
    for layout in world.layouts():
        for rank in layout.ranks:
            assert not rank.identical.kd.any(), say(
                world.seed, layout.size, layout.sequence_parallel
            )
            assert not rank.identical.total.any(), say(
                world.seed, layout.size, layout.sequence_parallel
            )
            assert rank.repeats_differ == 0, say(world.seed, layout.size, layout.sequence_parallel)
            assert rank.written_to == [], say(world.seed, rank.written_to)


def test_collectives_are_as_few_as_documented(world: World) -> None:
    """Count collectives per chunk.

    There is one all-gather of statistics, one sum of the gradient of hidden, and one all-gather of
    hidden if it is sliced.
    """
    for layout in world.layouts():
        split = int(layout.sequence_parallel)
        for schedule, walks in (("chunk", 1), ("save", 2), ("recompute", 2)):
            expected = dict(
                zip(
                    COLLECTIVES,
                    (CHUNKS + CHUNKS * split * walks, CHUNKS * (1 - split), CHUNKS * split),
                    strict=True,
                )
            )
            assert [rank.calls[schedule] for rank in layout.ranks] == [expected] * layout.size, (
                layout.size,
                split,
                schedule,
            )
        dense = dict(
            zip(
                COLLECTIVES,
                (CHUNKS * (2 + 2 * split), CHUNKS * (1 - split), CHUNKS * split),
                strict=True,
            )
        )
        assert [rank.calls["dense"] for rank in layout.ranks] == [dense] * layout.size, (
            layout.size,
            split,
            "dense",
        )


def test_every_rank_refuses_before_any_collective(world: World) -> None:
    for layout in world.layouts():
        for rank in layout.ranks:
            assert not rank.refusals, "\n".join(rank.refusals)
