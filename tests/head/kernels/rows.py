"""Make random rows of logits, and compute every row operation again over whole rows in fp64.

C rows, n logits, K ids.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kd.head.logit_rows import MASKED, GradientTerms, PlainRows
from megatron_kd.head.sizes import buffer_width
from megatron_kd.head.triton_rows import TritonRows

WIDTHS = (1, 31, 32, 33)
TEMPERATURES = (1.0, 2.0, 0.7)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    """Hold logits and ids of a chunk.

    Attributes:
        logits: fp32 [C, n].
        columns: int64 [C, K], unique but for n.
        label: int64 [C] in [0, n]; n stands for an id of another rank.
    """

    logits: Tensor
    columns: Tensor
    label: Tensor

    @property
    def valid(self) -> int:
        return self.logits.shape[1]

    def buffer(self, *, extra: int = 0) -> Tensor:
        """Return [C, W] on the device, with garbage outside the logits and spare columns."""
        buffer = torch.full((len(self.logits), buffer_width(self.valid) + extra), 3e4)
        buffer[:, : self.valid] = self.logits
        return buffer.to(DEVICE)

    def plain(self) -> PlainRows:
        return PlainRows(self.buffer(), self.valid)

    def triton(self, dtype: torch.dtype | None = None, *, extra: int = 0) -> TritonRows:
        return TritonRows(self.buffer(extra=extra), self.valid, dtype)

    def ids(self) -> tuple[Tensor, Tensor]:
        """Return columns and label on the device."""
        return self.columns.to(DEVICE), self.label.to(DEVICE)

    def support(self) -> Tensor:
        """Return bool [C, n], true at the columns of the support."""
        is_support = torch.zeros((len(self.logits), self.valid + 1), dtype=torch.bool)
        return is_support.scatter_(1, self.columns, True)[:, : self.valid]


def make_case(seed: int, *, rows: int = 4, valid: int, count: int, scale: float = 3.0) -> Case:
    """Return a random case.

    A third of the ids belong to other ranks, unless all columns are requested. Labels are among the
    ids, outside them and of other ranks.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn((rows, valid), generator=generator)
    columns = torch.rand((rows, valid), generator=generator).argsort(1)[:, : min(count, valid)]
    if count < valid:
        columns = columns.masked_fill(torch.rand(columns.shape, generator=generator) < 0.3, valid)
    label = torch.randint(0, valid + 1, (rows,), generator=generator)
    if columns.shape[1]:
        label[::3] = columns[::3, 0]
    label[1::4] = valid
    return Case(logits, columns, label)


def split_in_fp64(case: Case, temperature: float, *, total: bool, entropy: bool) -> Tensor:
    """Return `PlainRows.split`, [C, 6 + K]."""
    z = case.logits.double()
    rest = z.masked_fill(case.support(), -torch.inf)
    m = torch.cat([rest, torch.full_like(z[:, :0].sum(1, keepdim=True), -torch.inf)], 1).amax(1)
    m = torch.where(m > MASKED, m, 0.0)
    shifted = rest - m.unsqueeze(1)
    exp = shifted.exp()
    padded = torch.cat([z, torch.full((len(z), 1), -torch.inf, dtype=z.dtype)], 1)
    extracted_columns = torch.cat([case.label.unsqueeze(1), case.columns], 1)
    sums = (
        m,
        exp.sum(1),
        (shifted / temperature).exp().sum(1),
        z.sum(1) * total,
        torch.where(exp > 0, shifted * exp, 0.0).sum(1) * entropy,
    )
    return torch.cat([torch.stack(sums, 1), padded.gather(1, extracted_columns)], 1)


@dataclass(frozen=True)
class Coefficients:
    """Hold the floating-point arguments of `gradient`: [C], support [C, K].

    The constant is None as often as not.
    """

    shift: Tensor
    scale: Tensor
    scale_t: Tensor
    constant: Tensor | None
    support: Tensor
    label_value: Tensor


def make_coefficients(seed: int, case: Case, *, constant: bool) -> Coefficients:
    """Return random coefficients.

    The shift is the largest logit outside the support, as in the loss; 0 where there is none.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rows = len(case.logits)
    shift = split_in_fp64(case, 1.0, total=False, entropy=False)[:, 0].float()
    return Coefficients(
        shift,
        normal(rows),
        normal(rows),
        normal(rows) if constant else None,
        normal(*case.columns.shape),
        normal(rows),
    )


def gradient_in_fp64(case: Case, coefficients: Coefficients, temperature: float) -> Tensor:
    """Return `PlainRows.gradient`, [C, n]."""
    shifted = case.logits.double() - coefficients.shift.double().unsqueeze(1)
    gradient = (
        coefficients.scale.double().unsqueeze(1) * shifted.exp()
        + coefficients.scale_t.double().unsqueeze(1) * (shifted / temperature).exp()
    )
    if coefficients.constant is not None:
        gradient -= coefficients.constant.double().unsqueeze(1)
    gradient = torch.cat([gradient, gradient.new_zeros((len(gradient), 1))], 1).scatter_(
        1, case.columns, coefficients.support.double()
    )
    return gradient.scatter_add_(
        1, case.label.unsqueeze(1), coefficients.label_value.double().unsqueeze(1)
    )[:, : case.valid]


def triton_gradient(
    rows: TritonRows, case: Case, coefficients: Coefficients, temperature: float
) -> Tensor:
    """Return `TritonRows.gradient`, computed on the device, on the CPU."""
    columns, label = case.ids()
    constant = coefficients.constant
    terms = GradientTerms(
        shift=coefficients.shift.to(DEVICE),
        scale=coefficients.scale.to(DEVICE),
        scale_t=coefficients.scale_t.to(DEVICE),
        constant=None if constant is None else constant.to(DEVICE),
        temperature=temperature,
        columns=columns,
        support=coefficients.support.to(DEVICE),
        label=label,
        label_value=coefficients.label_value.to(DEVICE),
    )
    return rows.gradient(terms).cpu()


def cases(seed: int) -> Iterator[tuple[Case, float, tuple[object, ...]]]:
    """Yield every width with few ids or none, with sixteen, and with all of them.

    Each comes with the next temperature in turn and a description.
    """
    generator = random.Random(seed)
    turn = generator.randint(0, 2)
    for valid in (*WIDTHS, generator.randint(200, 300)):
        for count in sorted({generator.choice((0, 1, 7)), 16, valid if valid < 40 else 7}):
            if count <= valid:
                turn += 1
                temperature = TEMPERATURES[turn % 3]
                yield (
                    make_case(seed + turn, rows=3, valid=valid, count=count),
                    temperature,
                    (valid, count, temperature),
                )
