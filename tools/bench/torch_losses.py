"""Make losses of the output head in plain torch, for tools/bench_head.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_kd.targets import SparseTarget

from .head_variants import Call, HeadInputs


def torch_targets(device: torch.device) -> Call:
    """Make the selection of the teacher's top entries from full logits."""

    def call(inputs: HeadInputs, hidden: Tensor, weight: Tensor) -> SparseTarget:
        logits = inputs.teacher_logits().float()
        values, ids = logits.topk(inputs.top_k, dim=1)
        return SparseTarget(ids.int(), values - logits.logsumexp(1, keepdim=True))

    return call


def torch_ce(device: torch.device) -> Call:
    """Make cross-entropy on full logits."""
    return lambda inputs, hidden, weight: F.cross_entropy(hidden @ weight.t(), inputs.labels)


def torch_top_k(device: torch.device) -> Call:
    """Make cross-entropy and KL on the kept entries, on full logits."""

    def call(inputs: HeadInputs, hidden: Tensor, weight: Tensor) -> Tensor:
        log_p = F.log_softmax((hidden @ weight.t()).float(), dim=1)
        log_q = F.log_softmax(inputs.target.logprobs, dim=1)
        kd = F.kl_div(
            log_p.gather(1, inputs.target.indices.long()),
            log_q,
            reduction="batchmean",
            log_target=True,
        )
        return (1.0 - inputs.alpha) * F.nll_loss(log_p, inputs.labels) + inputs.alpha * kd

    return call


def torch_kl(device: torch.device) -> Call:
    """Make KL from the teacher's full distribution, on full logits."""

    def call(inputs: HeadInputs, hidden: Tensor, weight: Tensor) -> Tensor:
        log_p = F.log_softmax((hidden @ weight.t()).float(), dim=1)
        log_q = F.log_softmax(inputs.teacher_logits().float(), dim=1)
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)

    return call
