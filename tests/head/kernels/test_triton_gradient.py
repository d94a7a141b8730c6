"""Test the gradient of TritonRows against the same operation in fp64."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_kd.head.logit_rows import MASKED
from tests.head.kernels.rows import (
    Case,
    cases,
    gradient_in_fp64,
    make_case,
    make_coefficients,
    triton_gradient,
)
from tests.losses.cases import fresh_seed, say

# numpy warns where a GPU is silent: exp() of values that are replaced afterwards.
pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
    pytest.mark.usefixtures("small_blocks"),
]


@pytest.mark.parametrize("masked", [True, False], ids=["after split", "multiplied again"])
def test_gradient(masked: bool) -> None:
    """Compare relative to the sizes of the terms that each entry is a sum of.

    In bf16 the error is within one unit in the last place.
    """
    seed = fresh_seed()
    coin = random.Random(seed)
    for case, temperature, description in cases(seed):
        coefficients = make_coefficients(seed, case, constant=coin.random() < 0.5)
        expected = gradient_in_fp64(case, coefficients, temperature)
        sizes = gradient_in_fp64(case, absolute(coefficients), temperature).abs()
        for dtype, limit in ((None, 1e-5), (torch.bfloat16, 2**-7 + 1e-5)):
            rows = case.triton(dtype, extra=32 * coin.randint(0, 3))
            if masked:
                rows.buffer.scatter_(1, case.ids()[0], MASKED)
            gradient = triton_gradient(rows, case, coefficients, temperature)
            assert gradient.dtype == (dtype or torch.float32)
            assert gradient.shape == expected.shape
            assert torch.equal(rows.buffer.view(gradient.dtype)[:, : case.valid].cpu(), gradient)
            scale = sizes if dtype is None else expected.abs() + 1e-3 * sizes
            error = ((gradient.double() - expected).abs() / scale.clamp(min=1e-30)).amax().item()
            assert error < limit, say(seed, description, dtype, masked, error)


def absolute(coefficients: object) -> object:
    """Return the coefficients with every term made positive.

    The constant is subtracted, so it becomes negative.
    """
    values = {name: value for name, value in vars(coefficients).items() if name != "shift"}
    positive = {name: None if value is None else value.abs() for name, value in values.items()}
    if positive["constant"] is not None:
        positive["constant"] = -positive["constant"]
    return type(coefficients)(shift=coefficients.shift, **positive)  # type: ignore[attr-defined]


def test_gradient_of_huge_logits() -> None:
    """Check logits that are multiplied again, so that the support is far above the rest's shift.

    Values that overflow there are replaced.
    """
    seed = fresh_seed()
    case = make_case(seed, valid=150, count=7)
    case.label[1:] = 150
    case.logits.copy_(torch.where(case.support(), 1e4, -1e4) + case.logits)
    coefficients = make_coefficients(seed, case, constant=True)
    for dtype, limit in ((None, 1e-5), (torch.bfloat16, 2**-7)):
        gradient = triton_gradient(case.triton(dtype), case, coefficients, 2.0).double()
        plain = Case(case.logits.where(~case.support(), -1e4), case.columns, case.label)
        expected = gradient_in_fp64(plain, coefficients, 2.0)
        assert (gradient - expected).norm() < limit * expected.norm(), say(seed, dtype)
