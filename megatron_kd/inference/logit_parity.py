"""Whether a checkpoint of ours and a Hugging Face folder are the same model: logits on random tokens, in fp32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_kd.checkpoint.store import CheckpointInfo
from megatron_kd.config import ParallelSection
from megatron_kd.inference.frozen_model import FrozenModel
from megatron_kd.models.huggingface.transformers_model import load_causal_lm
from megatron_kd.parallel.groups import Groups

LIMIT = 1e-4


@dataclass(frozen=True)
class Comparison:
    """difference: largest |logit - logit|; scale: largest |logit|; tokens: how many positions were compared."""

    difference: float
    scale: float
    tokens: int

    @property
    def same(self) -> bool:
        """Within LIMIT, absolutely where logits are below 1, else relative to the largest."""
        return self.difference <= LIMIT * max(1.0, self.scale)


def random_tokens(
    info: CheckpointInfo, *, seed: int, sequences: int = 2, length: int = 64
) -> Tensor:
    """int64 [sequences, length], no longer than the model's sliding window."""
    length = min(length, info.model_section().sliding_window or length)
    return torch.randint(
        info.vocab_size, (sequences, length), generator=torch.Generator().manual_seed(seed)
    )


def our_logits(
    folder: Path, info: CheckpointInfo, groups: Groups, parallel: ParallelSection, tokens: Tensor
) -> Tensor | None:
    """fp32 [B, S, V] of the checkpoint, computed in fp32, on the CPU; None off the last stage. Collective over the world."""
    model = FrozenModel(
        folder, info, groups, parallel, precision="fp32", sequence_length=tokens.shape[1]
    )
    hidden = model.hidden(tokens.to(groups.platform.device))
    return None if hidden is None else model.logits(hidden).transpose(0, 1).cpu()


@torch.no_grad()
def huggingface_logits(folder: Path, tokens: Tensor) -> Tensor:
    """fp32 [B, S, V'] of a local folder through transformers, computed in fp32. ConfigError where transformers cannot load it."""
    model = load_causal_lm(folder, torch.float32, what="check")
    logits: Tensor = model(input_ids=tokens).logits
    return logits.float()


def compare(ours: Tensor, theirs: Tensor) -> Comparison:
    """Logits [B, S, V] beside [B, S, V'], V' >= V."""
    theirs = theirs[..., : ours.shape[-1]]
    return Comparison(
        float((ours - theirs).abs().max()), float(theirs.abs().max()), ours.shape[0] * ours.shape[1]
    )
