"""The divergences by name, and which of them a sparse target can serve: one rule for run files and for the library."""

from __future__ import annotations

from typing import Literal, get_args

DivergenceName = Literal[
    "forward_kl",
    "soft_cross_entropy",
    "reverse_kl",
    "jensen_shannon",
    "skew_kl",
    "skew_reverse_kl",
    "alpha_beta",
    "mse_logits",
    "mse_probabilities",
    "hard_label",
]
DIVERGENCES: tuple[str, ...] = get_args(DivergenceName)


def sparse_problem(
    name: str, *, tail: str, sampled: bool, ab_alpha: float, ab_beta: float
) -> str | None:
    """Why a sparse target cannot serve this divergence, as one sentence; None where it can.

    sampled: the target holds random draws. Under tail "renormalize", and for draws, every id outside the kept ones has
    teacher probability 0. Those ids' terms can be summed only where they are proportional to the student's probability.
    """
    given = f'divergence = "{name}"'
    if name == "forward_kl":
        return None
    if name == "mse_logits":
        return f"{given} compares the logits of all ids: it needs the dense teacher, not a sparse target"
    if tail not in ("bucket", "renormalize"):
        return f'{given} with a sparse target takes tail = "bucket" or "renormalize", not "{tail}"'
    if sampled and name == "hard_label":
        return f"{given} needs the teacher's likeliest id, which random draws do not tell: keep the likeliest ids, or use the dense teacher"
    if tail == "bucket" and not sampled:
        return None
    how = "keep the likeliest ids" if sampled else 'use tail = "bucket"'
    where = "with random draws" if sampled else 'with tail = "renormalize"'
    if name == "reverse_kl" or (name == "alpha_beta" and ab_alpha == 0.0):
        return f"{given} {where} is infinite, the teacher's probability outside the kept ids being 0: {how}, or the dense teacher"
    if name == "mse_probabilities" or (
        name == "alpha_beta" and abs(ab_alpha + ab_beta - 1.0) > 1e-9
    ):
        return f"{given} {where} has a term of its own for every id outside the kept ones: {how}, or the dense teacher"
    return None
