"""Hold sparse targets: what a teacher says about a token in K numbers instead of a vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

TAILS = ("drop", "renormalize", "bucket", "uniform")


@dataclass(frozen=True)
class SparseTarget:
    """Hold a teacher's distribution over each token's next token, kept on K ids.

    Attributes:
        indices: int32 [..., K], global vocabulary ids, -1 = unused slot; no id twice for a token.
        logprobs: fp32 [..., K], natural log, -inf = unused slot. For "top" targets at temperature 1
            and normalised over the full vocabulary (they sum to at most 1); for sampled ones
            log(count / num_draws), which sum to 1.
        log_tail: fp32 [...] or None, log of the teacher's mass outside `indices`, measured at
            `temperature`.
        entropy: fp32 [...] or None, the teacher's entropy over the full vocabulary at temperature
            1, nats.
        temperature: at which `log_tail` was measured, or at which the distribution was sampled.
        sampled: the entries are counts of random samples, already at `temperature`.
    """

    indices: Tensor
    logprobs: Tensor
    log_tail: Tensor | None = None
    entropy: Tensor | None = None
    temperature: float = 1.0
    sampled: bool = False

    def map(self, function: Callable[[Tensor], Tensor]) -> SparseTarget:
        """Return the target with `function` applied to every tensor."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        mapped: dict[str, Any] = {
            name: function(value) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **mapped)

    def tensors(self) -> list[Tensor]:
        """Return the tensors that are not None, in order."""
        return [t for f in fields(self) if isinstance(t := getattr(self, f.name), Tensor)]

    def flatten(self) -> SparseTarget:
        """Return the target with [..., K] reshaped to [N, K] and [...] to [N]."""
        lead = self.indices.dim() - 1
        return self.map(lambda t: t.reshape(-1, *t.shape[lead:]))

    def slice(self, start: int, stop: int) -> SparseTarget:
        """Return the targets of tokens start..stop (half-open) of a flattened target."""
        return self.map(lambda t: t[start:stop])


def sort_by_logprob(indices: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the entries of a target by falling log-probability, ties by rising id.

    Unused slots come last. The order depends on the entries alone, not on where they come from or
    how they were stored.

    Args:
        indices: int [..., K], -1 = unused slot.
        logprobs: [..., K], -inf = unused slot.

    Returns:
        Both arguments, reordered along the last dimension.
    """
    by_id = torch.where(indices >= 0, indices, torch.iinfo(indices.dtype).max).sort(dim=-1)
    logprobs, order = logprobs.gather(-1, by_id.indices).sort(dim=-1, descending=True, stable=True)
    return indices.gather(-1, by_id.indices.gather(-1, order)), logprobs


def assign_tail_to_label(target: SparseTarget, labels: Tensor) -> SparseTarget:
    """Return the target with the teacher's mass outside its entries assigned to the label.

    This is the repair of truncated targets that arXiv 2503.16870 compares with. Where the label is
    kept, its entry grows.

    Args:
        target: [..., K], not sampled.
        labels: int [...], negative: no label.

    Returns:
        Target [..., K + 1], whose entries sum to 1, at temperature 1.

    Raises:
        ValueError: the target was sampled, so that the mass outside is not known.
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
    is_label = (target.indices == labels.unsqueeze(-1)) & (labels >= 0).unsqueeze(-1)
    logprobs = torch.where(is_label, torch.logaddexp(log_q, log_tail.unsqueeze(-1)), log_q)
    is_added = (labels >= 0) & ~is_label.any(-1) & (log_tail > -torch.inf)
    added = torch.where(is_added, log_tail, -torch.inf).unsqueeze(-1)
    ids = torch.where(is_added, labels, -1).unsqueeze(-1)
    return SparseTarget(
        torch.cat([target.indices, ids], -1), torch.cat([logprobs, added], -1), None, target.entropy
    )


def check_target(target: SparseTarget, shape: torch.Size, *, vocab_size: int) -> None:
    """Raise ValueError unless `target` is well-formed for tokens of `shape`.

    Shapes and types are always checked. Values (ids in range, none twice, some support for each
    token) are checked on the CPU only: on a GPU, reading them back would stall the step, and the
    maker of the target has checked them already.

    Args:
        target: [..., K].
        shape: [...], the labels' shape.
        vocab_size: number of valid ids.
    """
    if target.indices.shape[:-1] != shape or target.logprobs.shape != target.indices.shape:
        raise ValueError(
            f"target.indices {tuple(target.indices.shape)} and target.logprobs "
            f"{tuple(target.logprobs.shape)} must both be "
            f"{(*shape, 'K')}: K entries per label"
        )
    for name in ("log_tail", "entropy"):
        tensor = getattr(target, name)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"target.{name} must have the labels' shape {tuple(shape)}, not "
                f"{tuple(tensor.shape)}"
            )
    if (
        target.indices.dtype not in (torch.int32, torch.int64)
        or not target.logprobs.dtype.is_floating_point
    ):
        raise ValueError(
            f"target.indices must be int32 and target.logprobs fp32, not {target.indices.dtype} "
            f"and {target.logprobs.dtype}"
        )
    if target.indices.is_cpu and target.indices.numel():
        _check_values(target, vocab_size)


def _check_values(target: SparseTarget, vocab_size: int) -> None:
    ids = target.indices
    if int(ids.max()) >= vocab_size or int(ids.min()) < -1:
        raise ValueError(
            f"target.indices holds ids {int(ids.min())}..{int(ids.max())}: valid are "
            f"0..{vocab_size - 1} and -1 for an unused slot"
        )
    ordered = ids.sort(dim=-1).values
    if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
        raise ValueError(
            "target.indices names an id twice for one token: each kept entry must be a different id"
        )
    if not bool(((ids >= 0) & (target.logprobs > -torch.inf)).any(dim=-1).all()):
        raise ValueError(
            "a token of target has no kept entry: every token needs at least one id with a finite "
            "log-probability"
        )


def check_temperature(target: SparseTarget, *, temperature: float | Tensor, tail: str) -> None:
    """Raise ValueError unless `target` holds what `tail` needs at the loss temperature.

    Args:
        target: the target of the loss.
        temperature: the teacher's temperature in the loss; a tensor [...]: one for each token.
        tail: one of TAILS.
    """
    if isinstance(temperature, Tensor):
        if tail != "renormalize" or target.sampled:
            cause = (
                "random draws are"
                if target.sampled
                else f"tail={tail!r} needs the teacher's mass outside the kept ids, which is"
            )
            raise ValueError(
                f"{cause} of one temperature for all tokens: keep the most probable ids and use "
                'tail="renormalize"'
            )
        return
    if (tail != "renormalize" or target.sampled) and target.temperature != temperature:
        cause = "was sampled" if target.sampled else f"knows its tail, which tail={tail!r} needs,"
        raise ValueError(
            f"the target {cause} at temperature {target.temperature}, not at {temperature}: make "
            "it at the loss temperature"
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
    """Return the teacher's kept entries and tail at its temperature in the loss.

    With the tail they sum to 1 (tail "drop", "bucket", "uniform"), or alone ("renormalize", where
    the tail is -inf). Unused slots are -inf.

    Args:
        target: [..., K].
        temperature: of the teacher in the loss; a tensor [...]: one for each token.
        tail: one of TAILS.

    Returns:
        log_q [..., K] and log_tail [...], natural log.

    Raises:
        ValueError: the target does not hold what that needs. The mass outside the kept ids is known
            at one temperature only, and random samples at one temperature say nothing exact about
            another.
    """
    check_temperature(target, temperature=temperature, tail=tail)
    used = target.indices >= 0
    log_q = torch.where(used, target.logprobs, -torch.inf)
    no_tail = torch.full_like(log_q[..., 0], -torch.inf)
    if target.sampled:
        return log_q, no_tail
    if tail == "renormalize":
        divisor = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
        return torch.log_softmax(log_q / divisor, dim=-1), no_tail
    assert not isinstance(temperature, Tensor)
    if target.log_tail is None:
        kept = torch.logsumexp(log_q, dim=-1).clamp(max=0.0)
        return log_q, torch.log(-torch.expm1(kept))
    log_tail = target.log_tail.to(log_q.dtype).clamp(max=0.0)
    if temperature == 1.0:
        return log_q, log_tail
    log_kept = torch.log(-torch.expm1(log_tail))
    return torch.log_softmax(log_q / temperature, dim=-1) + log_kept.unsqueeze(-1), log_tail
