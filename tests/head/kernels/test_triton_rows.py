"""Test TritonRows against the same operations in fp64 and against PlainRows.

Blocks are small, so that a row has several.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import astuple
from itertools import product

import pytest
import torch
from torch import Tensor

from megatron_kd.head import triton_rows
from megatron_kd.head.logit_rows import MASKED, PlainRows, chunk_rows
from megatron_kd.head.triton_rows import TritonRows
from tests.head.kernels.rows import (
    DEVICE,
    TEMPERATURES,
    Case,
    Coefficients,
    cases,
    make_case,
    make_coefficients,
    split_in_fp64,
    triton_gradient,
)
from tests.losses.cases import fresh_seed, say

# numpy warns where a GPU is silent: exp() of values that are replaced afterwards, deliberate NaN.
pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
    pytest.mark.usefixtures("small_blocks"),
]

EXACT = [0, 5]  # columns of a split that are read, not summed; the support follows from 6 on


def split_error(packed: Tensor, expected: Tensor, case: Case) -> float:
    """Return the largest relative error of a sum; inf where a value that is only read differs.

    The sum of all logits is compared relative to the sum of their sizes.
    """
    exact = [*EXACT, *range(6, packed.shape[1])]
    if not torch.equal(packed[:, exact].double(), expected[:, exact]):
        return float("inf")
    size = expected[:, 1:5].abs().clamp(min=1e-30)
    size[:, 2] = case.logits.double().abs().sum(1).clamp(min=1e-30)
    return ((packed[:, 1:5].double() - expected[:, 1:5]).abs() / size).amax().item()


def test_split() -> None:
    seed = fresh_seed()
    flags = random.Random(seed)
    for case, temperature, description in cases(seed):
        options = dict(total=flags.random() < 0.5, entropy=flags.random() < 0.5)
        rows, plain = case.triton(), case.plain()
        packed = rows.split(*case.ids(), temperature, **options).cpu()
        error = split_error(packed, split_in_fp64(case, temperature, **options), case)
        assert error < 1e-6, say(seed, description, options, error)
        error = split_error(
            packed, plain.split(*case.ids(), temperature, **options).cpu().double(), case
        )
        assert error < 2e-6, say(seed, description, options, "against PlainRows", error)
        assert torch.equal(rows.buffer, plain.buffer), say(
            seed, description, "the support is not extracted, or something else is"
        )


def test_split_once_more() -> None:
    """Check that a second split reads the rows as the first one left them.

    The sums of `top` before it do not matter.
    """
    seed = fresh_seed()
    case, second = make_case(seed, valid=200, count=9), make_case(seed + 1, valid=200, count=5)
    rows, plain = case.triton(), case.plain()
    rows.top(5, 2.0)
    for current, temperature in ((case, 1.0), (second, 2.0)):
        packed, expected = (
            r.split(*current.ids(), temperature, total=False, entropy=True).cpu()
            for r in (rows, plain)
        )
        assert torch.allclose(packed, expected, rtol=2e-6, atol=0), say(seed, temperature)


def test_logits_of_ten_thousand() -> None:
    """Check a support 2e4 above the rest, with a few large logits in the rest.

    The rest is relative to its own largest logit.
    """
    seed = fresh_seed()
    case = make_case(seed, valid=150, count=7)
    case.logits.copy_(torch.where(case.support(), 1e4, -1e4) + case.logits)
    case.logits[0] = case.logits[0].abs() * 3e3
    for temperature in TEMPERATURES:
        packed = case.triton().split(*case.ids(), temperature, total=True, entropy=True).cpu()
        error = split_error(
            packed, split_in_fp64(case, temperature, total=True, entropy=True), case
        )
        assert error < 1e-6, say(seed, temperature, error)
        assert packed.isfinite()[:, :5].all(), say(seed, temperature, error)


def test_masked_out_logits() -> None:
    """Check ids that a caller has masked out with MASKED.

    They have no mass but are part of the sum of all logits, as in PlainRows.
    """
    seed = fresh_seed()
    case = make_case(seed, valid=100, count=7)
    case.logits[:, 30:90] = MASKED
    case.logits[2] = MASKED
    packed, expected = (
        r.split(*case.ids(), 2.0, total=True, entropy=True).cpu()
        for r in (case.triton(), case.plain())
    )
    assert torch.allclose(packed, expected, rtol=2e-6, atol=0), say(seed, packed, expected)
    assert packed[2, :3].tolist() == [0.0, 0.0, 0.0]


def test_a_shard_without_logits() -> None:
    case = Case(
        torch.empty(3, 0), torch.zeros((3, 5), dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    )
    rows = case.triton()
    packed = rows.split(*case.ids(), 2.0, total=True, entropy=True).cpu()
    assert torch.equal(packed, torch.tensor([0.0] * 5 + [-torch.inf] * 6).expand(3, -1))
    assert [tuple(t.shape) for t in rows.top(0)] == [(3, 0), (3, 0)]
    assert not any(t.any() for t in rows.mass(2.0))
    coefficients = make_coefficients(0, case, constant=True)
    assert triton_gradient(case.triton(torch.bfloat16), case, coefficients, 2.0).shape == (3, 0)


def test_nan_reaches_the_results() -> None:
    """Check NaN in the rest, as the only logit of the rest, in the support, and as the label.

    The results of its row are never numbers, and no other row changes.
    """
    seed = fresh_seed()
    for nan, temperature in product((torch.nan, -torch.nan), (1.0, 2.0)):
        case = make_case(seed, rows=5, valid=100, count=7)
        nan_in_support, nan_in_rest = (
            case.columns[3].sort().values[0],
            (~case.support()[0]).nonzero()[-1],
        )
        case.logits[0, nan_in_rest], case.logits[3, nan_in_support] = nan, nan
        case.logits[4] = MASKED
        case.logits[4, (~case.support()[4]).nonzero()[0]] = nan
        packed, expected = (
            r.split(*case.ids(), temperature, total=True, entropy=True).cpu()
            for r in (case.triton(), case.plain())
        )
        assert torch.equal(packed.isnan(), expected.isnan()), say(
            seed, temperature, packed, expected
        )
        assert packed[0, :5].isnan().all()
        assert packed[4, :5].isnan().all()
        assert packed[3, 3].isnan()
        assert not packed[1].isnan().any()
        assert case.triton().mass(temperature)[1].isnan().tolist() == [
            True,
            False,
            False,
            True,
            True,
        ]
        values, columns = (t.cpu() for t in case.triton().top(7))
        assert values[:, 0].isnan().tolist() == [True, False, False, True, True], say(seed, values)
        assert columns[0, 0] == nan_in_rest
        assert columns[3, 0] == nan_in_support
        assert columns.max() < 100


def test_mass() -> None:
    seed = fresh_seed()
    for case, temperature, description in list(cases(seed))[::2]:
        largest, mass = (t.cpu().double() for t in case.triton().mass(temperature))
        z = case.logits.double()
        assert torch.equal(largest, z.amax(1)), say(seed, description)
        error = (
            (mass / ((z - largest.unsqueeze(1)) / temperature).exp().sum(1) - 1).abs().amax().item()
        )
        assert error < 1e-6, say(seed, description, error)


def sorted_row(case: Case, count: int) -> tuple[Tensor, Tensor]:
    values, columns = case.logits.double().sort(dim=1, descending=True, stable=True)
    return values[:, :count], columns[:, :count]


def test_top() -> None:
    """Check continuous values, a few values with many ties, and one value.

    Both zeros, masked-out ids and -inf are among them.
    """
    seed = fresh_seed()
    generator = torch.Generator().manual_seed(seed)
    for valid in (1, 33, random.Random(seed).randint(70, 250)):
        case = make_case(seed, rows=6, valid=valid, count=0)
        case.logits[1:4] = torch.randint(-2, 3, (3, valid), generator=generator).float()
        case.logits[2, ::3] = -0.0
        case.logits[3, ::2] = MASKED
        case.logits[4] = torch.where(
            torch.rand(valid, generator=generator) < 0.9, -torch.inf, case.logits[4]
        )
        case.logits[4, ::5] = MASKED
        case.logits[5] = -1.5
        rows = case.triton()
        for count in {1, min(7, valid), min(65, valid)}:
            values, columns = (t.cpu() for t in rows.top(count))
            expected = sorted_row(case, count)
            assert columns.dtype == torch.int64, say(seed, valid, count)
            assert torch.equal(columns, expected[1]), say(seed, valid, count)
            assert torch.equal(values.double(), expected[0]), say(seed, valid, count)


def test_top_beyond_the_limits_of_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = fresh_seed()
    case = make_case(seed, valid=300, count=0)
    for name in ("MAX_TOP_TILES", "MAX_TILES"):
        with monkeypatch.context() as patch:
            patch.setattr(triton_rows, name, 4)
            assert torch.equal(case.triton().top(6)[1].cpu(), sorted_row(case, 6)[1]), say(
                seed, name
            )


def test_a_teacher_reads_its_logits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that top, mass and split read the tiles once, with the bits that each gives alone."""
    seed = fresh_seed()
    launched: list[str] = []
    launch = triton_rows._launch

    def counting(kernel: object, *arguments: object, **constants: object) -> None:
        launched.append(kernel.fn.__name__ if hasattr(kernel, "fn") else str(kernel))
        launch(kernel, *arguments, **constants)  # type: ignore[arg-type]

    monkeypatch.setattr(triton_rows, "_launch", counting)
    for temperature in (1.0, 2.0):
        case = make_case(seed, rows=2, valid=150, count=0)
        rows = case.triton()
        _, columns = rows.top(6, temperature)
        case = Case(case.logits, columns.cpu(), case.label)
        mass = rows.mass(temperature)
        launched.clear()
        split = rows.split(columns, case.ids()[1], temperature, total=False, entropy=True)
        assert launched == ["split_kernel"]
        assert torch.equal(
            split, case.triton().split(*case.ids(), temperature, total=False, entropy=True)
        ), say(seed)
        assert all(
            torch.equal(a, b) for a, b in zip(mass, case.triton().mass(temperature), strict=True)
        ), say(seed)
        # Sums that were not requested the first time are computed.
        for new_temperature, total in ((0.7, False), (temperature, True)):
            new_rows = case.triton()
            new_rows.top(6, temperature)
            packed = new_rows.split(*case.ids(), new_temperature, total=total, entropy=True)
            assert torch.equal(
                packed, case.triton().split(*case.ids(), new_temperature, total=total, entropy=True)
            ), say(seed, new_temperature)


def test_tiles_as_in_torch() -> None:
    seed = fresh_seed()
    case = make_case(seed, valid=150, count=0)
    rows, plain = case.triton(), case.plain()
    tiles = torch.tensor([[0, 4], [1, 1], [2, 3], [4, 0]], device=DEVICE)
    shift = plain.buffer.amax(1)
    assert rows.tile == plain.tile
    assert torch.equal(rows.tiles(tiles), plain.tiles(tiles))
    assert torch.equal(rows.tile_mass(shift, 2.0), plain.tile_mass(shift, 2.0))


@pytest.mark.parametrize("make", [Case.plain, Case.triton], ids=["plain", "triton"])
def test_each_row_at_its_own_temperature(make: Callable[[Case], PlainRows]) -> None:
    """Compare, bit for bit, with each row alone at its temperature as a number."""
    seed = fresh_seed()
    case = make_case(seed, rows=5, valid=random.Random(seed).randint(40, 200), count=7)
    temperatures = torch.rand(5, generator=torch.Generator().manual_seed(seed)) * 3 + 0.2
    random_coefficients = make_coefficients(seed, case, constant=False)
    columns, label = case.ids()

    def both(rows_of_case: Case, part: slice, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
        coefficients = Coefficients(
            *(t[part] if t is not None else None for t in astuple(random_coefficients))
        )
        split = make(rows_of_case).split(
            columns[part], label[part], temperature, total=True, entropy=True
        )
        return split.cpu(), triton_gradient(
            make(rows_of_case), rows_of_case, coefficients, temperature
        )  # type: ignore[arg-type]

    together = both(case, slice(None), temperatures.to(DEVICE))
    for row in range(5):
        part = slice(row, row + 1)
        single_results = both(
            Case(case.logits[part], case.columns[part], case.label[part]),
            part,
            float(temperatures[row]),
        )
        assert all(
            torch.equal(full[part], single)
            for full, single in zip(together, single_results, strict=True)
        ), (row, say(seed))
    assert not torch.equal(together[0], both(case, slice(None), float(temperatures[0]))[0])


def test_runs_repeat() -> None:
    seed = fresh_seed()
    case = make_case(seed, rows=3, valid=150, count=16)
    coefficients = make_coefficients(seed, case, constant=False)

    def run() -> list[Tensor]:
        rows = case.triton(torch.bfloat16)
        return [
            *rows.top(16),
            rows.split(*case.ids(), 2.0, total=True, entropy=True),
            triton_gradient(rows, case, coefficients, 2.0),
        ]

    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(run(), run(), strict=True)
    ), say(seed)


def test_refused_buffers() -> None:
    for buffer in (
        torch.zeros(2, 64, dtype=torch.float64),
        torch.zeros(2, 128)[:, ::2],
        torch.zeros(4, 128)[:, :64],
    ):
        with pytest.raises(ValueError, match="TritonRows takes contiguous rows of fp32"):
            TritonRows(buffer, 40)


def test_rows_by_device_and_type() -> None:
    """Use plain torch on a CPU and in fp64, and import triton from no other module."""
    for dtype in (torch.float32, torch.float64):
        assert type(chunk_rows(torch.zeros(2, 64, dtype=dtype), 40, torch.bfloat16)) is PlainRows
    code = "import sys, megatron_kd.losses, megatron_kd.targets; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
