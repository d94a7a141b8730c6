"""SparseTarget: what a teacher says about one token, in K numbers instead of a vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

TAILS = ("drop", "renormalize", "bucket", "uniform")


@dataclass(frozen=True)
class SparseTarget:
    """A teacher's distribution over each token's next token, kept on K ids.

    indices: int32 [..., K] global vocabulary ids, -1 = unused slot; no id twice in a row.
    logprobs: fp32 [..., K] natural log, -inf = unused slot. For "top" targets at temperature 1 and normalised over the
        full vocabulary (they sum to at most 1); for sampled ones log(count / num_draws), which sum to 1.
    log_tail: fp32 [...] or None, log of the teacher's mass outside `indices`, measured at `temperature`.
    entropy: fp32 [...] or None, the teacher's entropy over the full vocabulary at temperature 1, nats.
    temperature: where `log_tail` was measured, or at which the draws were made.
    sampled: the entries are counts of draws, already at `temperature`.
    """

    indices: Tensor
    logprobs: Tensor
    log_tail: Tensor | None = None
    entropy: Tensor | None = None
    temperature: float = 1.0
    sampled: bool = False

    def map(self, function: Callable[[Tensor], Tensor]) -> SparseTarget:
        """The same target with `function` applied to every tensor."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        mapped: dict[str, Any] = {
            name: function(t) for name, t in named.items() if isinstance(t, Tensor)
        }
        return replace(self, **mapped)

    def tensors(self) -> list[Tensor]:
        """Those of the tensors that there are, in order."""
        return [t for f in fields(self) if isinstance(t := getattr(self, f.name), Tensor)]

    def flatten(self) -> SparseTarget:
        """[..., K] -> [N, K] and [...] -> [N]."""
        lead = self.indices.dim() - 1
        return self.map(lambda t: t.reshape(-1, *t.shape[lead:]))

    def slice(self, start: int, stop: int) -> SparseTarget:
        """Return the targets of tokens start..stop (half-open) of a flattened target."""
        return self.map(lambda t: t[start:stop])


def sort_by_logprob(indices: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """The entries [..., K] of a target by falling log-probability, equal ones by rising id, unused slots last.

    An order that the entries themselves tell: where they come from, or were stored in between, does not show.
    """
    rising = torch.where(indices >= 0, indices, torch.iinfo(indices.dtype).max).sort(dim=-1)
    logprobs, order = logprobs.gather(-1, rising.indices).sort(dim=-1, descending=True, stable=True)
    return indices.gather(-1, rising.indices.gather(-1, order)), logprobs


def assign_tail_to_label(target: SparseTarget, labels: Tensor) -> SparseTarget:
    """The same entries with the teacher's mass outside them given to the label: [..., K + 1] entries that sum to 1, at temperature 1.

    The repair of truncated targets that arXiv 2503.16870 compares with. Where the label (int [...], negative: none) is kept, its entry
    grows. ValueError for draws, which know of no mass outside.
    """
    if target.sampled:
        raise ValueError(
            "random draws do not say what mass is outside them: nothing can be given to the label"
        )
    log_q, log_tail = kept_distribution(
        replace(
            target, log_tail=target.log_tail if target.temperature == 1.0 else None, temperature=1.0
        ),
        temperature=1.0,
        tail="bucket",
    )
    labels = labels.to(target.indices.dtype)
    here = (target.indices == labels.unsqueeze(-1)) & (labels >= 0).unsqueeze(-1)
    kept = torch.where(here, torch.logaddexp(log_q, log_tail.unsqueeze(-1)), log_q)
    alone = (labels >= 0) & ~here.any(-1) & (log_tail > -torch.inf)
    more = torch.where(alone, log_tail, -torch.inf).unsqueeze(-1)
    ids = torch.where(alone, labels, -1).unsqueeze(-1)
    return SparseTarget(
        torch.cat([target.indices, ids], -1), torch.cat([kept, more], -1), None, target.entropy
    )


def check_target(target: SparseTarget, shape: torch.Size, *, vocab_size: int) -> None:
    """ValueError unless `target` is a well-formed target for tokens of `shape` over `vocab_size` ids.

    Shapes and types are always checked. Values (ids in range, none twice, some support in each row) are checked on CPU
    only: on a GPU reading them back would stall the step, and whoever made the target has checked them already.
    """
    if target.indices.shape[:-1] != shape or target.logprobs.shape != target.indices.shape:
        raise ValueError(
            f"target.indices {tuple(target.indices.shape)} and target.logprobs {tuple(target.logprobs.shape)} must both be "
            f"{(*shape, 'K')}: one row of K entries per label"
        )
    for name in ("log_tail", "entropy"):
        tensor = getattr(target, name)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"target.{name} must have the labels' shape {tuple(shape)}, not {tuple(tensor.shape)}"
            )
    if (
        target.indices.dtype not in (torch.int32, torch.int64)
        or not target.logprobs.dtype.is_floating_point
    ):
        raise ValueError(
            f"target.indices must be int32 and target.logprobs fp32, not {target.indices.dtype} and {target.logprobs.dtype}"
        )
    if target.indices.is_cpu and target.indices.numel():
        _check_values(target, vocab_size)


def _check_values(target: SparseTarget, vocab_size: int) -> None:
    ids = target.indices
    if int(ids.max()) >= vocab_size or int(ids.min()) < -1:
        raise ValueError(
            f"target.indices holds ids {int(ids.min())}..{int(ids.max())}: valid are 0..{vocab_size - 1} and -1 for an unused slot"
        )
    ordered = ids.sort(dim=-1).values
    if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
        raise ValueError(
            "target.indices names an id twice in one row: each kept entry must be a different id"
        )
    if not bool(((ids >= 0) & (target.logprobs > -torch.inf)).any(dim=-1).all()):
        raise ValueError(
            "a row of target has no kept entry: every token needs at least one id with a finite log-probability"
        )


def check_temperature(target: SparseTarget, *, temperature: float | Tensor, tail: str) -> None:
    """ValueError unless `target` says what `tail` needs at the teacher's temperature in the loss; a tensor: each token's own."""
    if isinstance(temperature, Tensor):
        if tail != "renormalize" or target.sampled:
            what = (
                "random draws are"
                if target.sampled
                else f"tail={tail!r} needs the teacher's mass outside the kept ids, which is"
            )
            raise ValueError(
                f'{what} of one temperature for all tokens: keep the likeliest ids and use tail="renormalize"'
            )
        return
    if (tail != "renormalize" or target.sampled) and target.temperature != temperature:
        what = "was sampled" if target.sampled else f"knows its tail, which tail={tail!r} needs,"
        raise ValueError(
            f"the target {what} at temperature {target.temperature}, not at {temperature}: make it at the loss temperature"
        )
    if (
        tail != "renormalize"
        and not target.sampled
        and target.log_tail is None
        and temperature != 1.0
    ):
        raise ValueError(f"tail={tail!r} at temperature {temperature} needs target.log_tail")


def kept_distribution(
    target: SparseTarget, *, temperature: float | Tensor, tail: str
) -> tuple[Tensor, Tensor]:
    """The teacher's kept entries and tail at its temperature in the loss: (log_q [..., K], log_tail [...]), natural log.

    With the tail they sum to 1 (tail "drop", "bucket", "uniform") or alone ("renormalize", where the tail is -inf).
    Unused slots are -inf. ValueError where the target does not hold what that needs: the mass outside the kept ids is
    known at one temperature only, and draws made at one temperature say nothing exact about another.
    """
    check_temperature(target, temperature=temperature, tail=tail)
    used = target.indices >= 0
    log_q = torch.where(used, target.logprobs, -torch.inf)
    none = torch.full_like(log_q[..., 0], -torch.inf)
    if target.sampled:
        return log_q, none
    if tail == "renormalize":
        over = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
        return torch.log_softmax(log_q / over, dim=-1), none
    assert not isinstance(temperature, Tensor)
    if target.log_tail is None:
        kept = torch.logsumexp(log_q, dim=-1).clamp(max=0.0)
        return log_q, torch.log(-torch.expm1(kept))
    log_tail = target.log_tail.to(log_q.dtype).clamp(max=0.0)
    if temperature == 1.0:
        return log_q, log_tail
    log_kept = torch.log(-torch.expm1(log_tail))
    return torch.log_softmax(log_q / temperature, dim=-1) + log_kept.unsqueeze(-1), log_tail
