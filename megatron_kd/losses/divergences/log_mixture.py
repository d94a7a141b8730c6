"""Compute the logarithm of a mixture of two probabilities from their logarithmic difference."""

from __future__ import annotations

import torch
from torch import Tensor


def log_mixture(difference: Tensor, weight: float) -> Tensor:
    """Return log((1 - weight) + weight exp(difference)), exactly 0 at a difference of 0."""
    below = torch.log1p(weight * torch.expm1(difference.clamp(max=0.0)))
    above = difference + torch.log1p((1.0 - weight) * torch.expm1(-difference.clamp(min=0.0)))
    return torch.where(difference > 0, above, below)
