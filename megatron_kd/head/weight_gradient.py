"""Where the gradient of the output weight is summed, and megatron-core's contract about it.

A parameter under megatron-core's DistributedDataParallel has a `main_grad` (fp32 as a rule) into which all microbatches
are summed. Whoever adds to it directly sets `grad_added_to_main_grad` and returns a dummy gradient, so that DDP's hook
still fires; where `zero_out_wgrad` is set (tied embeddings) the hook adds what is returned, which must then be zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_kd.head.output_weight import OutputWeight, compute_dtype
from megatron_kd.parallel.vocab_shards import VocabShard


class WeightGradient:
    """Sums d(loss)/d(weight) [V/tp, H] in fp32 (fp64), chunk by chunk or slab by slab.

    into_main: straight into `weight.main_grad`, which must exist and have that type; else into scratch of its own.
    """

    def __init__(self, weight: Tensor, shard: VocabShard, *, into_main: bool) -> None:
        dtype = compute_dtype(weight.dtype)
        self.into_main = into_main
        self._fresh = not into_main
        if into_main:
            self.sum: Tensor = weight.main_grad  # type: ignore[attr-defined]
        else:
            self.sum = torch.empty(weight.shape, dtype=dtype, device=weight.device)
            self.sum[shard.valid :] = 0.0

    def add(self, head: OutputWeight, logit_gradient: Tensor, hidden: Tensor) -> None:
        """logit_gradient [C, n], hidden [C, H] of one chunk."""
        head.add_weight_gradient_(self.sum, logit_gradient, hidden, first=self._fresh)
        self._fresh = False

    def add_slab(
        self, head: OutputWeight, logit_gradient: Tensor, hidden: Tensor, start: int
    ) -> None:
        """logit_gradient [N, m] of all tokens, for the weight's rows from `start` on."""
        rows = self.sum[start : start + logit_gradient.shape[1]]
        head.add_weight_gradient_(rows, logit_gradient, hidden, first=not self.into_main)


def takes_main_grad(weight: Tensor) -> bool:
    """Whether gradients of `weight` belong in a `main_grad` of the type they are summed in."""
    main = getattr(weight, "main_grad", None)
    return main is not None and main.dtype == compute_dtype(weight.dtype)


def hand_over(weight: Tensor, gradient: WeightGradient, scale: Tensor | None) -> Tensor:
    """What a backward returns for `weight`: the gradient times `scale` (a scalar tensor), or, after adding that to main_grad, a dummy."""
    main = getattr(weight, "main_grad", None)
    if main is None:
        return (gradient.sum if scale is None else gradient.sum.mul_(scale)).to(weight.dtype)
    if not gradient.into_main:
        if scale is not None:
            gradient.sum.mul_(scale)
        main.add_(gradient.sum)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    make = torch.zeros if getattr(weight, "zero_out_wgrad", False) else torch.empty
    return make(weight.shape, dtype=weight.dtype, device=weight.device)
