"""Sum the gradient of the output weight, following megatron-core's contract about main_grad.

A parameter under megatron-core's DistributedDataParallel has a `main_grad` (usually fp32) into
which all microbatches are summed. A backward that adds to it directly sets
`grad_added_to_main_grad` and returns a dummy gradient, so that DDP's hook still fires. If
`zero_out_wgrad` is set (tied embeddings), the hook adds the returned gradient, which must then be
zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_kd.head.output_weight import OutputWeight, compute_dtype
from megatron_kd.parallel.vocab_shards import VocabShard


class WeightGradient:
    """Sum d(loss)/d(weight) [V/tp, H] in fp32 (fp64 for fp64 weights), by chunks or by slabs.

    Attributes:
        into_main: True if the sum is `weight.main_grad`, False if it is scratch memory.
        sum: [V/tp, H], the gradient; rows of padding are zero.
    """

    def __init__(self, weight: Tensor, shard: VocabShard, *, into_main: bool) -> None:
        dtype = compute_dtype(weight.dtype)
        self.into_main = into_main
        self._uninitialised = not into_main
        if into_main:
            self.sum: Tensor = weight.main_grad  # type: ignore[attr-defined]
        else:
            self.sum = torch.empty(weight.shape, dtype=dtype, device=weight.device)
            self.sum[shard.valid :] = 0.0

    def add(self, head: OutputWeight, logit_gradient: Tensor, states: Tensor) -> None:
        """Add the product of a chunk's logit gradient [C, n] and hidden states [C, H]."""
        head.add_weight_gradient_(self.sum, logit_gradient, states, overwrite=self._uninitialised)
        self._uninitialised = False

    def add_slab(
        self, head: OutputWeight, logit_gradient: Tensor, states: Tensor, start: int
    ) -> None:
        """Add the gradient of the weight's rows from `start` on, from all tokens.

        Args:
            head: the slab of the output weight.
            logit_gradient: [N, m], for the slab's m rows.
            states: [N, H].
            start: first row of the slab on this rank.
        """
        slab = self.sum[start : start + logit_gradient.shape[1]]
        head.add_weight_gradient_(slab, logit_gradient, states, overwrite=not self.into_main)


def has_main_grad(weight: Tensor) -> bool:
    """Return True if `weight` has a `main_grad` of the type in which its gradient is summed."""
    main = getattr(weight, "main_grad", None)
    return main is not None and main.dtype == compute_dtype(weight.dtype)


def deliver(weight: Tensor, gradient: WeightGradient, scale: Tensor | None) -> Tensor:
    """Return what a backward returns for `weight`: its gradient, or a dummy for DDP's hook.

    Args:
        weight: [V/tp, H]. If it has a main_grad, the gradient is added there.
        gradient: the sum over all chunks.
        scale: scalar tensor that multiplies the gradient, None for 1.
    """
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
