"""Make the losses of megatron-core and other libraries, for tools/bench_head.py."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .head_variants import Call, HeadInputs


def single_rank_group(device: torch.device) -> dist.ProcessGroup:
    """Return a process group of this process: megatron-core's losses always call collectives."""
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.HashStore(),
            rank=0,
            world_size=1,
        )
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _megatron_fused(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Return (logits [N, V], labels [N]) -> mean; it overwrites fp32 logits."""
    from megatron_kd.parallel.platform import quiet_megatron

    quiet_megatron()
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    group = single_rank_group(device)
    return lambda logits, labels: fused_vocab_parallel_cross_entropy(
        logits.unsqueeze(1), labels.unsqueeze(1), group
    ).mean()


def megatron_ce(device: torch.device) -> Call:
    """Make megatron-core's fused cross-entropy on full logits."""
    loss = _megatron_fused(device)
    return lambda inputs, hidden, weight: loss(hidden @ weight.t(), inputs.labels)


def megatron_top_k(device: torch.device) -> Call:
    """Make megatron-core's cross-entropy and an eager KL on gathered entries.

    Megatron-LM trains with this loss on cached logits.
    """
    cross_entropy = _megatron_fused(device)

    def call(inputs: HeadInputs, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.t()
        wide = logits.float()
        wide = wide - wide.amax(dim=1, keepdim=True).detach()
        log_p = wide - wide.exp().sum(dim=1, keepdim=True).log()
        log_q = F.log_softmax(inputs.target.logprobs, dim=1)
        kd = (log_q.exp() * (log_q - log_p.gather(1, inputs.target.indices.long()))).sum(1).mean()
        return (1.0 - inputs.alpha) * cross_entropy(logits, inputs.labels) + inputs.alpha * kd

    return call


def liger_ce(accumulate: torch.dtype | None) -> Callable[[torch.device], Call]:
    """Make Liger's fused cross-entropy."""

    def make(device: torch.device) -> Call:
        from liger_kernel.transformers.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyLoss,
        )

        loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=accumulate)
        return lambda inputs, hidden, weight: loss(weight, hidden, inputs.labels)

    return make


def liger_jsd(beta: float) -> Callable[[torch.device], Call]:
    """Make Liger's fused generalized JSD."""

    def make(device: torch.device) -> Call:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        loss = LigerFusedLinearJSD(jsd_beta=beta)
        return lambda inputs, hidden, weight: loss(
            hidden, weight, inputs.teacher_hidden, inputs.teacher_weight, None
        )

    return make


def liger_chunked(name: str, beta: float) -> Callable[[torch.device], Call]:
    """Make one of Liger's chunked losses.

    torch.compile is its default. It is off on a CPU, where compiling takes longer than measuring.
    """

    def make(device: torch.device) -> Call:
        chunked = importlib.import_module("liger_kernel.chunked_loss")

        def call(inputs: HeadInputs, hidden: Tensor, weight: Tensor) -> Tensor:
            loss = getattr(chunked, name)(
                weight_hard_loss=1.0 - inputs.alpha,
                weight_soft_loss=inputs.alpha,
                beta=beta,
                compiled=device.type == "cuda",
            )
            return loss(hidden, weight, inputs.teacher_hidden, inputs.teacher_weight, inputs.labels)

        return call

    return make


def modelopt(*names: str) -> Callable[[torch.device], Call]:
    """Make a logit loss of Model-Optimizer, under the first of `names` that this version has.

    It takes the logits of both models, [s, b, V].
    """

    def make(device: torch.device) -> Call:
        plugin = importlib.import_module("modelopt.torch.distill.plugins.megatron")
        kind = next(getattr(plugin, name) for name in names if hasattr(plugin, name))
        config = SimpleNamespace(tensor_model_parallel_size=1, sequence_parallel=False)

        def call(inputs: HeadInputs, hidden: Tensor, weight: Tensor) -> Tensor:
            loss = kind(config, top_k=inputs.top_k) if "Top" in kind.__name__ else kind(config)
            per_token, *_ = loss(
                (hidden @ weight.t()).unsqueeze(1), inputs.teacher_logits().unsqueeze(1)
            )
            return per_token.mean()

        return call

    return make


def cut_cross_entropy(**options: Any) -> Callable[[torch.device], Call]:
    """Make Apple's cut cross-entropy."""

    def make(device: torch.device) -> Call:
        from cut_cross_entropy import linear_cross_entropy

        return lambda inputs, hidden, weight: linear_cross_entropy(
            hidden, weight, inputs.labels, **options
        )

    return make
