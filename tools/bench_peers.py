"""The losses that tools/bench_head.py times: this project's, plain torch's, megatron-core's and those of other libraries.

    python tools/bench_peers.py        # which of them can run here, what each computes, and what the others lack

A library is used where it can be imported; nothing is installed. Every variant takes the student's final hidden states and its
output weight and returns the mean of its loss over the tokens; tools/bench_head.py holds the gradients against fp64.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import megatron_kd.losses as losses
from megatron_kd.head.output_weight import linear_logits
from megatron_kd.head.sizes import chunk_size
from megatron_kd.head.token_chunks import TokenChunks
from megatron_kd.losses import kd_cross_entropy, linear_kd_cross_entropy
from megatron_kd.parallel.vocab_shards import vocab_shard
from megatron_kd.targets import SparseTarget, TopSelection, linear_targets

# Largest relative error of a gradient, by the type of the inputs. What rounds its logits to the inputs' type loses far more
# than that near the teacher; megatron-core's fused cross-entropy hands its gradient out in bf16 whatever it is given.
EXACT = {"fp32": 1e-4, "bf16": 2e-2}
ROUNDED_LOGITS = {"fp32": 1e-4, "bf16": 0.6}
ROUNDED_GRADIENT = {"fp32": 2e-2, "bf16": 0.6}


@dataclass(frozen=True)
class Inputs:
    """One output head. N tokens, H hidden, H_t the teacher's hidden, V vocabulary, K kept entries of the teacher.

    hidden [N, H], weight [V, H], teacher_hidden [N, H_t], teacher_weight [V, H_t] of one float type; labels [N] int64;
    target: the teacher's K likeliest ids, found in fp64, as a cache would hold them. alpha: weight of the distillation loss.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    target: SparseTarget
    alpha: float

    @property
    def tokens(self) -> int:
        """N."""
        return self.labels.numel()

    @property
    def top_k(self) -> int:
        """K."""
        return self.target.indices.shape[1]

    def teacher_logits(self) -> Tensor:
        """[N, V] in the inputs' type."""
        with torch.no_grad():
            return self.teacher_hidden @ self.teacher_weight.t()


Call = Callable[[Inputs, Tensor, Tensor], Any]


@dataclass(frozen=True)
class Variant:
    """One way to compute a loss.

    computes: the loss; "targets" (choosing the teacher's top entries) or "product" (the teacher's logits alone) have no
    gradient. teacher: "none", "cached" (the target is an input) or "online" (the teacher's product is part of the time).
    make: imports what is needed and returns call(inputs, hidden, weight) -> mean loss. module: what must be importable.
    main_grad: adds the gradient of the weight to weight.main_grad, which is an input, in place of returning it.
    """

    name: str
    computes: str
    teacher: str
    make: Callable[[torch.device], Call]
    limits: dict[str, float] = field(default_factory=lambda: EXACT)
    module: str | None = None
    needs_cuda: bool = False
    main_grad: bool = False
    own: bool = False

    def limit(self, dtype: str, near: float) -> float:
        """Largest relative error of a gradient, for a student whose logits are `near` the teacher's.

        A distance alone has a gradient that small, but fp32 logits of 16 to 32 have steps of 2e-6: a few of these are no mistake.
        """
        return (
            max(self.limits[dtype], 4 * 2**-19 / near)
            if self.computes in DISTANCES
            else self.limits[dtype]
        )

    def prepare(self, device: torch.device) -> Call:
        """The call; Unavailable where it cannot run here."""
        if self.module and importlib.util.find_spec(self.module.split(".")[0]) is None:
            raise Unavailable("not installed")
        if self.needs_cuda and device.type != "cuda":
            raise Unavailable("needs CUDA")
        try:
            with warnings.catch_warnings():  # of what the libraries would like to find beside them
                warnings.simplefilter("ignore")
                return self.make(device)
        except (ImportError, AttributeError) as error:
            raise Unavailable(f"cannot be imported: {error}") from error


class Unavailable(Exception):
    """Why a variant cannot run here."""


TOP_K_LOSS, DISTANCES = "CE + KL(top-k || p)", ("KL", "JSD", "KL within top-k")


def _head(schedule: str) -> Callable[[torch.device], Call]:
    """linear_kd_cross_entropy on the cached target. The mean is a sum and a division: a schedule may need a uniform upstream."""

    def call(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
        # "direct" adds to main_grad in the forward, so the division must be in the weights of the tokens.
        mask = (
            torch.full(inputs.labels.shape, 1.0 / inputs.tokens, device=hidden.device)
            if schedule == "direct"
            else None
        )
        loss = linear_kd_cross_entropy(
            hidden,
            weight,
            inputs.labels,
            inputs.target,
            alpha=inputs.alpha,
            loss_mask=mask,
            schedule=schedule,
        ).total.sum()
        return loss if schedule == "direct" else loss / inputs.tokens

    return lambda device: call


def _head_ce(device: torch.device) -> Call:
    return lambda inputs, hidden, weight: (
        linear_kd_cross_entropy(hidden, weight, inputs.labels, None, alpha=0.0).total.sum()
        / inputs.tokens
    )


def _given_logits(device: torch.device) -> Call:
    return lambda inputs, hidden, weight: (
        kd_cross_entropy(
            hidden @ weight.t(), inputs.labels, inputs.target, alpha=inputs.alpha
        ).total.sum()
        / inputs.tokens
    )


def _targets(device: torch.device) -> Call:
    return lambda inputs, hidden, weight: linear_targets(
        inputs.teacher_hidden, inputs.teacher_weight, TopSelection(inputs.top_k)
    )


def _online(device: torch.device) -> Call:
    def call(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
        target = linear_targets(
            inputs.teacher_hidden, inputs.teacher_weight, TopSelection(inputs.top_k)
        )
        return (
            linear_kd_cross_entropy(
                hidden, weight, inputs.labels, target, alpha=inputs.alpha
            ).total.sum()
            / inputs.tokens
        )

    return call


def _dense(divergence: str) -> Callable[[torch.device], Call]:
    def make(device: torch.device) -> Call:
        if not hasattr(losses, "linear_divergence"):
            raise Unavailable("not in this version")

        def call(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
            teacher = losses.DenseTeacher(inputs.teacher_hidden, inputs.teacher_weight)
            loss = losses.linear_divergence(
                hidden, weight, inputs.labels, teacher, divergence=divergence, alpha=1.0
            )
            return loss.total.sum() / inputs.tokens

        return call

    return make


def _teacher_product(device: torch.device) -> Call:
    """The logits that linear_targets multiplies, chunk by chunk, and nothing made of them."""

    def call(inputs: Inputs, hidden: Tensor, weight: Tensor) -> None:
        rows = inputs.teacher_weight.shape[0]
        shard = vocab_shard(rows, rank=0, size=1, vocab_size=None)
        chunks = TokenChunks(
            inputs.tokens, 1, chunk_size(None, rows, inputs.tokens, on_cuda=hidden.is_cuda)
        )
        for _ in linear_logits(inputs.teacher_hidden, inputs.teacher_weight, shard, chunks, None):
            pass

    return call


def _torch_targets(device: torch.device) -> Call:
    def call(inputs: Inputs, hidden: Tensor, weight: Tensor) -> SparseTarget:
        logits = inputs.teacher_logits().float()
        values, ids = logits.topk(inputs.top_k, dim=1)
        return SparseTarget(ids.int(), values - logits.logsumexp(1, keepdim=True))

    return call


def _torch_ce(device: torch.device) -> Call:
    return lambda inputs, hidden, weight: F.cross_entropy(hidden @ weight.t(), inputs.labels)


def _torch_top_k(device: torch.device) -> Call:
    def call(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
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


def _torch_kl(device: torch.device) -> Call:
    def call(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
        log_p = F.log_softmax((hidden @ weight.t()).float(), dim=1)
        log_q = F.log_softmax(inputs.teacher_logits().float(), dim=1)
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)

    return call


def single_rank_group(device: torch.device) -> dist.ProcessGroup:
    """A process group of this process alone: megatron-core's losses call their collectives even then."""
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
    """(logits [N, V], labels [N]) -> mean; consumes fp32 logits."""
    from megatron_kd.parallel.platform import quiet_megatron

    quiet_megatron()
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    group = single_rank_group(device)
    return lambda logits, labels: fused_vocab_parallel_cross_entropy(
        logits.unsqueeze(1), labels.unsqueeze(1), group
    ).mean()


def _megatron_ce(device: torch.device) -> Call:
    loss = _megatron_fused(device)
    return lambda inputs, hidden, weight: loss(hidden @ weight.t(), inputs.labels)


def _megatron_top_k(device: torch.device) -> Call:
    """megatron-core's cross-entropy beside an eager KL on gathered entries, the loss Megatron-LM trains with on cached logits."""
    cross_entropy = _megatron_fused(device)

    def call(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.t()
        wide = logits.float()
        wide = wide - wide.amax(dim=1, keepdim=True).detach()
        log_p = wide - wide.exp().sum(dim=1, keepdim=True).log()
        log_q = F.log_softmax(inputs.target.logprobs, dim=1)
        kd = (log_q.exp() * (log_q - log_p.gather(1, inputs.target.indices.long()))).sum(1).mean()
        return (1.0 - inputs.alpha) * cross_entropy(logits, inputs.labels) + inputs.alpha * kd

    return call


def _liger_ce(accumulate: torch.dtype | None) -> Callable[[torch.device], Call]:
    def make(device: torch.device) -> Call:
        from liger_kernel.transformers.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyLoss,
        )

        loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=accumulate)
        return lambda inputs, hidden, weight: loss(weight, hidden, inputs.labels)

    return make


def _liger_jsd(beta: float) -> Callable[[torch.device], Call]:
    def make(device: torch.device) -> Call:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        loss = LigerFusedLinearJSD(jsd_beta=beta)
        return lambda inputs, hidden, weight: loss(
            hidden, weight, inputs.teacher_hidden, inputs.teacher_weight, None
        )

    return make


def _liger_chunked(name: str, beta: float) -> Callable[[torch.device], Call]:
    """torch.compile is its default; left out on a CPU, where compiling takes longer than the benchmark."""

    def make(device: torch.device) -> Call:
        chunked = importlib.import_module("liger_kernel.chunked_loss")

        def call(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
            loss = getattr(chunked, name)(
                weight_hard_loss=1.0 - inputs.alpha,
                weight_soft_loss=inputs.alpha,
                beta=beta,
                compiled=device.type == "cuda",
            )
            return loss(hidden, weight, inputs.teacher_hidden, inputs.teacher_weight, inputs.labels)

        return call

    return make


def _modelopt(*names: str) -> Callable[[torch.device], Call]:
    """Model-Optimizer's logit losses, under whichever of `names` this version has; it takes a model's logits, both [s, b, V]."""

    def make(device: torch.device) -> Call:
        plugin = importlib.import_module("modelopt.torch.distill.plugins.megatron")
        kind = next(getattr(plugin, name) for name in names if hasattr(plugin, name))
        config = SimpleNamespace(tensor_model_parallel_size=1, sequence_parallel=False)

        def call(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
            loss = kind(config, top_k=inputs.top_k) if "Top" in kind.__name__ else kind(config)
            per_token, *_ = loss(
                (hidden @ weight.t()).unsqueeze(1), inputs.teacher_logits().unsqueeze(1)
            )
            return per_token.mean()

        return call

    return make


def _cut_cross_entropy(**options: Any) -> Callable[[torch.device], Call]:
    def make(device: torch.device) -> Call:
        from cut_cross_entropy import linear_cross_entropy

        return lambda inputs, hidden, weight: linear_cross_entropy(
            hidden, weight, inputs.labels, **options
        )

    return make


BASELINE, PLAIN, PRODUCT = "megatron-fused-ce", "torch-ce", "teacher-product"
NO_GRADIENT = ("product", "targets")
MEGATRON, LIGER, MODELOPT, CCE = "megatron", "liger_kernel", "modelopt", "cut_cross_entropy"
VARIANTS: list[Variant] = [
    Variant(BASELINE, "CE", "none", _megatron_ce, ROUNDED_GRADIENT, MEGATRON),
    Variant(PLAIN, "CE", "none", _torch_ce, ROUNDED_LOGITS),
    Variant("head-ce", "CE", "none", _head_ce, own=True),
    Variant("liger-ce", "CE", "none", _liger_ce(None), EXACT | {"bf16": 0.1}, LIGER, True),
    Variant(
        "liger-ce-fp32-sum",
        "CE",
        "none",
        _liger_ce(torch.float32),
        EXACT | {"bf16": 0.1},
        LIGER,
        True,
    ),
    Variant("cce", "CE", "none", _cut_cross_entropy(), EXACT, CCE, True),
    Variant("cce-unfiltered", "CE", "none", _cut_cross_entropy(filter_eps=None), EXACT, CCE, True),
    *(
        Variant(
            f"head-{schedule}",
            TOP_K_LOSS,
            "cached",
            _head(schedule),
            own=True,
            main_grad=schedule == "direct",
        )
        for schedule in ("save", "chunk", "direct", "recompute")
    ),
    Variant("given-logits", TOP_K_LOSS, "cached", _given_logits, ROUNDED_LOGITS, own=True),
    Variant("torch-top-k", TOP_K_LOSS, "cached", _torch_top_k, ROUNDED_LOGITS),
    Variant("megatron-top-k", TOP_K_LOSS, "cached", _megatron_top_k, ROUNDED_GRADIENT, MEGATRON),
    Variant("online", TOP_K_LOSS, "online", _online, own=True),
    Variant(
        "modelopt-top-k",
        "KL within top-k",
        "online",
        _modelopt("TopKLogitsKLLoss", "TopLogitsKLLoss"),
        ROUNDED_LOGITS,
        MODELOPT,
    ),
    Variant("dense-kl", "KL", "online", _dense("forward_kl"), own=True),
    Variant("torch-kl", "KL", "online", _torch_kl, ROUNDED_LOGITS),
    Variant("modelopt-kl", "KL", "online", _modelopt("LogitsKLLoss"), ROUNDED_LOGITS, MODELOPT),
    Variant("liger-kl", "KL", "online", _liger_jsd(0.0), ROUNDED_LOGITS, LIGER, True),
    Variant("dense-jsd", "JSD", "online", _dense("jensen_shannon"), own=True),
    Variant("liger-jsd", "JSD", "online", _liger_jsd(0.5), ROUNDED_LOGITS, LIGER, True),
    Variant(
        "liger-chunked-jsd",
        "CE + JSD",
        "online",
        _liger_chunked("LigerFusedLinearJSDLoss", 0.5),
        ROUNDED_LOGITS,
        LIGER,
    ),
    Variant(
        "liger-chunked-cosine",
        "CE + cosine",
        "online",
        _liger_chunked("LigerFusedLinearCosineSimilarityLoss", 1.0),
        ROUNDED_LOGITS,
        LIGER,
    ),
    Variant(PRODUCT, "product", "online", _teacher_product, own=True),
    Variant("targets", "targets", "online", _targets, own=True),
    Variant("torch-targets", "targets", "online", _torch_targets, ROUNDED_LOGITS),
]


def versions() -> dict[str, str | None]:
    """Versions of what takes part, None for what is not installed."""
    found: dict[str, str | None] = {}
    for name in (
        "torch",
        "triton",
        "megatron-core",
        "liger-kernel",
        "nvidia-modelopt",
        "cut-cross-entropy",
    ):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def main() -> int:
    """Print what can run here."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    kind = parser.parse_args().device
    device = torch.device(
        kind if kind != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    )
    for variant in VARIANTS:
        try:
            variant.prepare(device)
            says = "runs"
        except Unavailable as reason:
            says = str(reason)
        print(f"{variant.name:22} {variant.computes:20} teacher {variant.teacher:7} {says}")
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
