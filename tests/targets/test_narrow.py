"""A part of a stored target is what its selection would have kept."""

from __future__ import annotations

import pytest
import torch

from megatron_kd.targets import SparseTarget, TopSelection, select_targets
from megatron_kd.targets.narrow import is_contained, narrow, parse_top_selection
from tests.losses.cases import fresh_seed, make_problem, say

STORED = (TopSelection(20), TopSelection(20, 0.97, 2))
WANTED = (
    TopSelection(1),
    TopSelection(7),
    TopSelection(20),
    TopSelection(20, 0.8),
    TopSelection(9, 0.6, 2),
    TopSelection(20, 0.97, 1),
)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("wanted", WANTED)
def test_part_of_a_target_is_the_target_of_the_part(
    stored: TopSelection, wanted: TopSelection
) -> None:
    seed = fresh_seed()
    logits = make_problem(seed).teacher.float().round(decimals=1)  # with ties
    # Where a prefix has the mass top_p but for rounding, either choice is right.
    mass = logits.double().softmax(1).sort(1, descending=True).values.cumsum(1)
    logits = logits[((mass - wanted.top_p).abs() > 1e-6).all(1) | (wanted.top_p == 1.0)]
    assert len(logits) > 30, say(seed)
    whole, expected = select_targets(logits, stored), select_targets(logits, wanted)
    if not is_contained(wanted, stored):
        assert stored.top_p < 1
        assert wanted.top_p > stored.top_p
        return
    mixed = whole.map(
        lambda each: each if each.dim() == 1 else each.flip(1)
    )  # whatever order a record has
    found = narrow(mixed, wanted)
    assert torch.equal(found.indices, expected.indices), say(seed)
    used = found.indices >= 0
    # The last bits depend on what was summed apart from the rest.
    torch.testing.assert_close(found.logprobs[used], expected.logprobs[used], rtol=1e-6, atol=1e-6)
    assert (~torch.isfinite(found.logprobs[~used])).all()
    assert found.entropy is not None
    assert whole.entropy is not None
    assert torch.equal(found.entropy, whole.entropy)
    assert found.log_tail is not None
    assert expected.log_tail is not None
    torch.testing.assert_close(found.log_tail, expected.log_tail, rtol=2e-5, atol=2e-6)


def test_what_is_no_part() -> None:
    stored = TopSelection(20)
    assert not any(
        is_contained(wanted, stored)
        for wanted in (TopSelection(21), TopSelection(5, temperature=2.0))
    )
    assert not is_contained(TopSelection(5), TopSelection(20, temperature=2.0))
    assert not is_contained(TopSelection(5, 0.99), TopSelection(20, 0.9))
    assert not is_contained(TopSelection(5, 0.5, 3), TopSelection(20, 0.9, 2))


def test_a_selection_and_its_text() -> None:
    for selection in (*STORED, *WANTED, TopSelection(3, 1e-05, 1, 0.05)):
        assert parse_top_selection(repr(selection)) == selection
    assert parse_top_selection("SampleSelection(num_draws=4, seed=1, temperature=1.0)") is None


def test_without_a_tail() -> None:
    target = SparseTarget(
        torch.tensor([[4, 2, -1]], dtype=torch.int32), torch.tensor([[0.5, 0.5, 0.0]]).log()
    )
    found = narrow(target, TopSelection(1))
    assert found.indices.tolist() == [[2]]
    assert found.log_tail is None
