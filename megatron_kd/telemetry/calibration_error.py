"""Compute the expected calibration error from sums that add up over batches and ranks.

ECE = sum over bins of |hits - confidence| / tokens, where a bin holds tokens of similar top-1
probability: 15 bins of equal width, (k/15, (k+1)/15], or 15 bins with equally many tokens
(adaptive). Guo et al., arXiv 1706.04599; Nguyen and O'Connor, arXiv 1508.05154. The sums are kept
in FINE_BINS bins of equal width, 200 for each of the wide ones, which are exact unions of them. The
adaptive bins divide a fine bin in proportion; its tokens differ by 1/3000 in confidence.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15
FINE_BINS = 200 * BINS


def calibration_sums(confidence: Tensor, hit: Tensor, weight: Tensor) -> Tensor:
    """Return the tokens, sum of confidences and hits of each fine bin: fp64 [3, FINE_BINS].

    Sums of different batches and ranks can be added.

    Args:
        confidence: [N] float, top-1 probability in [0, 1].
        hit: [N] bool, True where the top-1 id is the label.
        weight: [N] float, 1 where the token counts, otherwise 0.
    """
    bins = (confidence.double() * FINE_BINS).ceil().long().clamp(1, FINE_BINS) - 1
    weight = weight.double()
    values = torch.stack([weight, weight * confidence.double(), weight * hit.double()])
    sums = torch.zeros(3, FINE_BINS, dtype=torch.float64, device=confidence.device)
    return sums.index_add_(1, bins, values)


def expected_calibration_error(sums: Tensor) -> float:
    """Return the error of 15 bins of equal width, in [0, 1], from `calibration_sums`."""
    tokens, confidence, hits = sums.view(3, BINS, -1).sum(2)
    return float((hits - confidence).abs().sum() / tokens.sum())


def adaptive_calibration_error(sums: Tensor) -> float:
    """Return the error of 15 bins with equally many tokens, in [0, 1], from `calibration_sums`."""
    zero = torch.zeros(3, 1, dtype=sums.dtype, device=sums.device)
    cumulative = torch.cat([zero, sums.cumsum(1)], dim=1).contiguous()
    tokens = cumulative[0].contiguous()
    cuts = torch.linspace(0, 1, BINS + 1, dtype=sums.dtype, device=sums.device) * tokens[-1]
    right = torch.searchsorted(tokens, cuts).clamp(1, FINE_BINS)
    left = right - 1
    share = (cuts - tokens[left]) / (tokens[right] - tokens[left]).clamp(min=1e-300)
    share = share.clamp(0.0, 1.0)
    values = cumulative[1:, left] + share * (cumulative[1:, right] - cumulative[1:, left])
    confidence, hits = values.diff(dim=1)
    return float((hits - confidence).abs().sum() / tokens[-1])
