"""Test that a target narrowed from a stored one is what its selection would have kept."""

from __future__ import annotations

import pytest
import torch

from megatron_kd.targets import SparseTarget, TopSelection, select_targets
from megatron_kd.targets.narrow import is_contained, narrow, parse_top_selection
from tests.losses.cases import fresh_seed, make_problem, say

STORED = (TopSelection(20), TopSelection(20, 0.97, 2))
SELECTIONS = (
    TopSelection(1),
    TopSelection(7),
    TopSelection(20),
    TopSelection(20, 0.8),
    TopSelection(9, 0.6, 2),
    TopSelection(20, 0.97, 1),
)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_narrowed_target_equals_the_selected_one(
    stored: TopSelection, selection: TopSelection
) -> None:
    seed = fresh_seed()
    logits = make_problem(seed).teacher.float().round(decimals=1)  # With ties.
    # Where a prefix has the mass top_p but for rounding, either choice is right.
    mass = logits.double().softmax(1).sort(1, descending=True).values.cumsum(1)
    logits = logits[((mass - selection.top_p).abs() > 1e-6).all(1) | (selection.top_p == 1.0)]
    assert len(logits) > 30, say(seed)
    stored_target, expected = select_targets(logits, stored), select_targets(logits, selection)
    if not is_contained(selection, stored):
        assert stored.top_p < 1
        assert selection.top_p > stored.top_p
        return
    # A record may have any order.
    mixed = stored_target.map(lambda tensor: tensor if tensor.dim() == 1 else tensor.flip(1))
    target = narrow(mixed, selection)
    assert torch.equal(target.indices, expected.indices), say(seed)
    used = target.indices >= 0
    # The last bits depend on the order of the sums.
    torch.testing.assert_close(target.logprobs[used], expected.logprobs[used], rtol=1e-6, atol=1e-6)
    assert (~torch.isfinite(target.logprobs[~used])).all()
    assert target.entropy is not None
    assert stored_target.entropy is not None
    assert torch.equal(target.entropy, stored_target.entropy)
    assert target.log_tail is not None
    assert expected.log_tail is not None
    torch.testing.assert_close(target.log_tail, expected.log_tail, rtol=2e-5, atol=2e-6)


def test_selections_that_are_not_contained() -> None:
    stored = TopSelection(20)
    assert not any(
        is_contained(selection, stored)
        for selection in (TopSelection(21), TopSelection(5, temperature=2.0))
    )
    assert not is_contained(TopSelection(5), TopSelection(20, temperature=2.0))
    assert not is_contained(TopSelection(5, 0.99), TopSelection(20, 0.9))
    assert not is_contained(TopSelection(5, 0.5, 3), TopSelection(20, 0.9, 2))


def test_a_selection_and_its_text() -> None:
    for selection in (*STORED, *SELECTIONS, TopSelection(3, 1e-05, 1, 0.05)):
        assert parse_top_selection(repr(selection)) == selection
    assert parse_top_selection("SampleSelection(num_draws=4, seed=1, temperature=1.0)") is None


def test_without_a_tail() -> None:
    target = SparseTarget(
        torch.tensor([[4, 2, -1]], dtype=torch.int32), torch.tensor([[0.5, 0.5, 0.0]]).log()
    )
    narrowed = narrow(target, TopSelection(1))
    assert narrowed.indices.tolist() == [[2]]
    assert narrowed.log_tail is None
