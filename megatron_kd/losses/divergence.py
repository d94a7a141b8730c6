"""Evaluate a divergence and its derivatives, as declared in config/declarations/divergences.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from megatron_kd.config.declarations.divergences import (
    DIVERGENCES,
    PARAMETERS,
    DivergenceDeclaration,
)
from megatron_kd.losses.sparse_comparison import ABSENT, Slopes, SparseComparison


@dataclass(frozen=True, init=False)
class Divergence:
    """Choose a divergence by name, with its parameters.

    Attributes:
        name: key of `config.declarations.divergences.DIVERGENCES`.
        parameters: every declared parameter by name; a divergence ignores those of others. Each is
            also an attribute, such as `js_beta`.

    Raises:
        ValueError: an unknown name, or a parameter out of its range.
        TypeError: an unknown parameter.
    """

    name: str
    parameters: Mapping[str, float] = field(hash=False)

    def __init__(self, name: str = "forward_kl", **parameters: float) -> None:
        if name not in DIVERGENCES:
            raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, not {name!r}")
        unknown = ", ".join(parameters.keys() - PARAMETERS)
        if unknown:
            raise TypeError(f"no divergence has a parameter {unknown}: {', '.join(PARAMETERS)}")
        values = {
            key: parameters.get(key, declared.default) for key, declared in PARAMETERS.items()
        }
        for key, value in values.items():
            PARAMETERS[key].check(value)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "parameters", values)

    def __getattr__(self, name: str) -> float:
        if name in PARAMETERS:
            return self.parameters[name]
        raise AttributeError(name)

    @property
    def declaration(self) -> DivergenceDeclaration:
        """Return this divergence's entry of DIVERGENCES."""
        return DIVERGENCES[self.name]

    def terms(self, log_q: Tensor, log_p: Tensor, vocab_size: int) -> Tensor:
        """Return the terms of the sum over ids, differentiable in log_p.

        Args:
            log_q: [..., M], the teacher's log-probabilities. For a centred divergence shifted so
                that log_p - log_q has mean 0; for one that needs the top id 0 there, else ABSENT.
            log_p: [..., M], the student's log-probabilities.
            vocab_size: V.
        """
        keywords = {
            parameter.name: self.parameters[parameter.name]
            for parameter in self.declaration.parameters
        }
        term: Callable[..., Tensor] = self._module.term
        terms = term(log_q, log_p, **keywords)
        return terms / vocab_size if self.declaration.averaged else terms

    def terms_and_slopes(
        self, log_q: Tensor, log_p: Tensor, vocab_size: int
    ) -> tuple[Tensor, Tensor]:
        """Return the terms and the derivative of each by its log_p, both [..., M] and detached.

        Args:
            log_q: as in `terms`.
            log_p: as in `terms`.
            vocab_size: V.
        """
        with torch.enable_grad():
            leaf = log_p.detach().requires_grad_()
            terms = self.terms(log_q, leaf, vocab_size)
            (slopes,) = torch.autograd.grad(terms.sum(), leaf)
        return terms.detach(), slopes

    def compare_sparse(self, comparison: SparseComparison) -> tuple[Tensor, Slopes]:
        """Return the divergence [C] from a sparse target and its slopes.

        Without a closed form of its own, a divergence is summed over the kept ids and one entry
        for all other ids.
        """
        if hasattr(self._module, "compare_sparse"):
            closed_form: Callable[[SparseComparison], tuple[Tensor, Slopes]]
            closed_form = self._module.compare_sparse
            return closed_form(comparison)
        teacher, student = comparison.teacher, comparison.student
        exists = torch.cat([teacher.indices >= 0, (teacher.num_others > 0).unsqueeze(1)], 1)
        log_p = torch.cat([student.log_support, student.log_rest.unsqueeze(1)], 1)
        log_q = torch.cat([teacher.log_q, teacher.log_tail.unsqueeze(1)], 1)
        if self.declaration.needs_top_id:
            log_q = torch.where(_top_entry(log_q, teacher.indices), 0.0, ABSENT)
        log_p, log_q = (
            torch.where(exists, log, ABSENT).clamp(min=ABSENT) for log in (log_p, log_q)
        )
        terms, slopes = self.terms_and_slopes(log_q, log_p, comparison.vocab_size)
        return terms.sum(1), Slopes(slopes[:, :-1], slopes[:, -1], slopes.sum(1))

    @property
    def _module(self) -> ModuleType:
        return import_module(f"megatron_kd.losses.divergences.{self.name}")


def _top_entry(log_q: Tensor, indices: Tensor) -> Tensor:
    """Return bool [C, K + 1]: the kept entry with the largest log_q, of equal ones the smallest id.

    The last entry, all other ids together, is never chosen.
    """
    log_kept = log_q[:, :-1]
    largest = log_kept == log_kept.amax(1, keepdim=True)
    smallest_id = torch.where(largest, indices, torch.iinfo(indices.dtype).max).amin(
        1, keepdim=True
    )
    return torch.nn.functional.pad(largest & (indices == smallest_id), (0, 1))
