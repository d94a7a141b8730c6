"""Whether a model's confidence is its hit rate: expected calibration error, from sums that add up over batches and ranks.

ECE = sum over bins of |hits - confidence| / tokens, where a bin holds tokens of similar top-1 probability: 15 of equal width, (k/15,
(k+1)/15], or 15 with equally many tokens (adaptive). Guo et al., arXiv 1706.04599; Nguyen and O'Connor, arXiv 1508.05154. The sums are
kept in FINE bins of equal width, BINS times 200: the wide bins are exactly unions of them; the adaptive ones cut a fine bin in proportion,
whose tokens differ by 1/3000 in confidence.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15
FINE = 200 * BINS


def calibration_sums(confidence: Tensor, hit: Tensor, weight: Tensor) -> Tensor:
    """fp64 [3, FINE]: tokens, sum of confidences, hits of each fine bin. Of any number of batches and ranks they add up.

    Args:
        confidence: [N] float, top-1 probability in [0, 1]. hit: [N] bool, whether the top-1 id is the label.
        weight: [N] float, 1 where the token counts, 0 where it does not.
    """
    at = (confidence.double() * FINE).ceil().long().clamp(1, FINE) - 1
    weight = weight.double()
    values = torch.stack([weight, weight * confidence.double(), weight * hit.double()])
    return torch.zeros(3, FINE, dtype=torch.float64, device=confidence.device).index_add_(
        1, at, values
    )


def expected_calibration_error(sums: Tensor) -> float:
    """Of 15 bins of equal width, from `calibration_sums`, in [0, 1]."""
    tokens, confidence, hits = sums.view(3, BINS, -1).sum(2)
    return float((hits - confidence).abs().sum() / tokens.sum())


def adaptive_calibration_error(sums: Tensor) -> float:
    """Of 15 bins with equally many tokens, from `calibration_sums`, in [0, 1]."""
    from_zero = torch.cat(
        [torch.zeros(3, 1, dtype=sums.dtype, device=sums.device), sums.cumsum(1)], dim=1
    ).contiguous()
    tokens = from_zero[0].contiguous()
    cuts = torch.linspace(0, 1, BINS + 1, dtype=sums.dtype, device=sums.device) * tokens[-1]
    right = torch.searchsorted(tokens, cuts).clamp(1, FINE)
    share = (
        (cuts - tokens[right - 1]) / (tokens[right] - tokens[right - 1]).clamp(min=1e-300)
    ).clamp(0.0, 1.0)
    confidence, hits = (
        from_zero[1:, right - 1] + share * (from_zero[1:, right] - from_zero[1:, right - 1])
    ).diff(dim=1)
    return float((hits - confidence).abs().sum() / tokens[-1])
