"""List the losses of the output head that tools/bench_head.py measures."""

from __future__ import annotations

import importlib.metadata

import torch

from . import own_losses, peer_losses, torch_losses
from .head_variants import (
    EXACT,
    ROUNDED_GRADIENT,
    ROUNDED_LOGITS,
    TOP_K_LOSS,
    HeadVariant,
)

# The variants that ratios are formed to.
BASELINE, PLAIN, PRODUCT = "megatron-fused-ce", "torch-ce", "teacher-product"
MEGATRON, LIGER, MODELOPT, CCE = "megatron", "liger_kernel", "modelopt", "cut_cross_entropy"
VARIANTS: list[HeadVariant] = [
    HeadVariant(BASELINE, "CE", "none", peer_losses.megatron_ce, ROUNDED_GRADIENT, MEGATRON),
    HeadVariant(PLAIN, "CE", "none", torch_losses.torch_ce, ROUNDED_LOGITS),
    HeadVariant("head-ce", "CE", "none", own_losses.head_ce, internal=True),
    HeadVariant(
        "liger-ce", "CE", "none", peer_losses.liger_ce(None), EXACT | {"bf16": 0.1}, LIGER, True
    ),
    HeadVariant(
        "liger-ce-fp32-sum",
        "CE",
        "none",
        peer_losses.liger_ce(torch.float32),
        EXACT | {"bf16": 0.1},
        LIGER,
        True,
    ),
    HeadVariant("cce", "CE", "none", peer_losses.cut_cross_entropy(), EXACT, CCE, True),
    HeadVariant(
        "cce-unfiltered",
        "CE",
        "none",
        peer_losses.cut_cross_entropy(filter_eps=None),
        EXACT,
        CCE,
        True,
    ),
    *(
        HeadVariant(
            f"head-{schedule}",
            TOP_K_LOSS,
            "cached",
            own_losses.head(schedule),
            internal=True,
            main_grad=schedule == "direct",
        )
        for schedule in ("save", "chunk", "direct", "recompute")
    ),
    HeadVariant(
        "given-logits", TOP_K_LOSS, "cached", own_losses.given_logits, ROUNDED_LOGITS, internal=True
    ),
    HeadVariant("torch-top-k", TOP_K_LOSS, "cached", torch_losses.torch_top_k, ROUNDED_LOGITS),
    HeadVariant(
        "megatron-top-k",
        TOP_K_LOSS,
        "cached",
        peer_losses.megatron_top_k,
        ROUNDED_GRADIENT,
        MEGATRON,
    ),
    HeadVariant("online", TOP_K_LOSS, "online", own_losses.online, internal=True),
    HeadVariant(
        "modelopt-top-k",
        "KL within top-k",
        "online",
        peer_losses.modelopt("TopKLogitsKLLoss", "TopLogitsKLLoss"),
        ROUNDED_LOGITS,
        MODELOPT,
    ),
    HeadVariant("dense-kl", "KL", "online", own_losses.dense("forward_kl"), internal=True),
    HeadVariant("torch-kl", "KL", "online", torch_losses.torch_kl, ROUNDED_LOGITS),
    HeadVariant(
        "modelopt-kl",
        "KL",
        "online",
        peer_losses.modelopt("LogitsKLLoss"),
        ROUNDED_LOGITS,
        MODELOPT,
    ),
    HeadVariant(
        "liger-kl", "KL", "online", peer_losses.liger_jsd(0.0), ROUNDED_LOGITS, LIGER, True
    ),
    HeadVariant("dense-jsd", "JSD", "online", own_losses.dense("jensen_shannon"), internal=True),
    HeadVariant(
        "liger-jsd", "JSD", "online", peer_losses.liger_jsd(0.5), ROUNDED_LOGITS, LIGER, True
    ),
    HeadVariant(
        "liger-chunked-jsd",
        "CE + JSD",
        "online",
        peer_losses.liger_chunked("LigerFusedLinearJSDLoss", 0.5),
        ROUNDED_LOGITS,
        LIGER,
    ),
    HeadVariant(
        "liger-chunked-cosine",
        "CE + cosine",
        "online",
        peer_losses.liger_chunked("LigerFusedLinearCosineSimilarityLoss", 1.0),
        ROUNDED_LOGITS,
        LIGER,
    ),
    HeadVariant(PRODUCT, "product", "online", own_losses.teacher_product, internal=True),
    HeadVariant("targets", "targets", "online", own_losses.targets, internal=True),
    HeadVariant("torch-targets", "targets", "online", torch_losses.torch_targets, ROUNDED_LOGITS),
]


def package_versions() -> dict[str, str | None]:
    """Return the versions of the packages that take part, None for missing ones."""
    versions: dict[str, str | None] = {}
    for name in (
        "torch",
        "triton",
        "megatron-core",
        "liger-kernel",
        "nvidia-modelopt",
        "cut-cross-entropy",
    ):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions
