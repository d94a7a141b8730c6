"""Random rows of logits, and every row operation written once more over whole rows in fp64. C rows, n logits, K ids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_kd.head.logit_rows import MASKED, PlainRows
from megatron_kd.head.sizes import buffer_width
from megatron_kd.head.triton_rows import TritonRows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    """logits fp32 [C, n]; columns int64 [C, K], unique but for n; label int64 [C] in [0, n], n being elsewhere."""

    logits: Tensor
    columns: Tensor
    label: Tensor

    @property
    def valid(self) -> int:
        return self.logits.shape[1]

    def buffer(self, *, extra: int = 0) -> Tensor:
        """[C, W] on the device, with garbage where nothing has been multiplied; `extra` more columns than needed."""
        buffer = torch.full((len(self.logits), buffer_width(self.valid) + extra), 3e4)
        buffer[:, : self.valid] = self.logits
        return buffer.to(DEVICE)

    def plain(self) -> PlainRows:
        return PlainRows(self.buffer(), self.valid)

    def triton(self, dtype: torch.dtype | None = None, *, extra: int = 0) -> TritonRows:
        return TritonRows(self.buffer(extra=extra), self.valid, dtype)

    def ids(self) -> tuple[Tensor, Tensor]:
        """columns and label on the device."""
        return self.columns.to(DEVICE), self.label.to(DEVICE)

    def support(self) -> Tensor:
        """bool [C, n]: the columns of the support."""
        kept = torch.zeros((len(self.logits), self.valid + 1), dtype=torch.bool)
        return kept.scatter_(1, self.columns, True)[:, : self.valid]


def make_case(seed: int, *, rows: int = 4, valid: int, count: int, scale: float = 3.0) -> Case:
    """A third of the ids elsewhere unless all columns are asked for; labels among the ids, outside them and elsewhere."""
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
    """`PlainRows.split`, [C, 6 + K]."""
    z = case.logits.double()
    rest = z.masked_fill(case.support(), -torch.inf)
    m = torch.cat([rest, torch.full_like(z[:, :0].sum(1, keepdim=True), -torch.inf)], 1).amax(1)
    m = torch.where(m > MASKED, m, 0.0)
    away = rest - m.unsqueeze(1)
    exp = away.exp()
    padded = torch.cat([z, torch.full((len(z), 1), -torch.inf, dtype=z.dtype)], 1)
    where = torch.cat([case.label.unsqueeze(1), case.columns], 1)
    sums = (
        m,
        exp.sum(1),
        (away / temperature).exp().sum(1),
        z.sum(1) * total,
        torch.where(exp > 0, away * exp, 0.0).sum(1) * entropy,
    )
    return torch.cat([torch.stack(sums, 1), padded.gather(1, where)], 1)


@dataclass(frozen=True)
class Coefficients:
    """The arguments of `gradient`: [C], support [C, K]; constant None as often as not."""

    shift: Tensor
    scale: Tensor
    scale_t: Tensor
    constant: Tensor | None
    support: Tensor
    label_value: Tensor


def make_coefficients(seed: int, case: Case, *, constant: bool) -> Coefficients:
    """shift: the largest logit outside the support, as in the loss; where there is none, 0."""
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


def gradient_in_fp64(case: Case, given: Coefficients, temperature: float) -> Tensor:
    """`PlainRows.gradient`, [C, n]."""
    away = case.logits.double() - given.shift.double().unsqueeze(1)
    found = (
        given.scale.double().unsqueeze(1) * away.exp()
        + given.scale_t.double().unsqueeze(1) * (away / temperature).exp()
    )
    if given.constant is not None:
        found -= given.constant.double().unsqueeze(1)
    found = torch.cat([found, found.new_zeros((len(found), 1))], 1).scatter_(
        1, case.columns, given.support.double()
    )
    return found.scatter_add_(1, case.label.unsqueeze(1), given.label_value.double().unsqueeze(1))[
        :, : case.valid
    ]


def triton_gradient(
    rows: TritonRows, case: Case, given: Coefficients, temperature: float
) -> Tensor:
    """`TritonRows.gradient` on the device, back on the CPU."""
    shift, scale, scale_t, support, value = (
        t.to(DEVICE)
        for t in (given.shift, given.scale, given.scale_t, given.support, given.label_value)
    )
    constant = None if given.constant is None else given.constant.to(DEVICE)
    columns, label = case.ids()
    return rows.gradient(
        shift, scale, scale_t, constant, temperature, columns, support, label, value
    ).cpu()
