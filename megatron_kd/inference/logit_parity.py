"""Compare a checkpoint with a Hugging Face folder by their logits on random tokens, in fp32."""

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
    """Hold the result of a comparison of logits.

    Attributes:
        difference: Largest absolute difference of two logits.
        scale: Largest absolute logit.
        tokens: Number of positions that were compared.
    """

    difference: float
    scale: float
    tokens: int

    @property
    def same(self) -> bool:
        """Return True within LIMIT, relative to the largest logit if that is above 1."""
        return self.difference <= LIMIT * max(1.0, self.scale)


def random_tokens(
    info: CheckpointInfo, *, seed: int, sequences: int = 2, length: int = 64
) -> Tensor:
    """Return random ids, int64 [sequences, length].

    Args:
        info: Description of the checkpoint.
        seed: Seed of the ids.
        sequences: Number of sequences.
        length: Tokens of a sequence, limited by the model's sliding window.
    """
    length = min(length, info.model_section().sliding_window or length)
    return torch.randint(
        info.vocab_size, (sequences, length), generator=torch.Generator().manual_seed(seed)
    )


def checkpoint_logits(
    folder: Path, info: CheckpointInfo, groups: Groups, parallel: ParallelSection, tokens: Tensor
) -> Tensor | None:
    """Return the logits of a checkpoint, computed in fp32. Collective over the world.

    Args:
        folder: Folder of the checkpoint.
        info: Its description.
        groups: Process groups.
        parallel: Layout of the model.
        tokens: Ids, int64 [B, S].

    Returns:
        fp32 [B, S, V] on the CPU; None except on the last pipeline stage.
    """
    model = FrozenModel(
        folder, info, groups, parallel, precision="fp32", sequence_length=tokens.shape[1]
    )
    hidden = model.hidden(tokens.to(groups.platform.device))
    return None if hidden is None else model.logits(hidden).transpose(0, 1).cpu()


@torch.no_grad()
def huggingface_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Return the logits that transformers computes in fp32, fp32 [B, S, V'].

    Raises:
        ConfigError: transformers cannot load the folder.
    """
    model = load_causal_lm(folder, torch.float32, setting="check")
    logits: Tensor = model(input_ids=tokens).logits
    return logits.float()


def compare(checkpoint: Tensor, huggingface: Tensor) -> Comparison:
    """Compare logits [B, S, V] with logits [B, S, V'], V' >= V."""
    huggingface = huggingface[..., : checkpoint.shape[-1]]
    return Comparison(
        difference=float((checkpoint - huggingface).abs().max()),
        scale=float(huggingface.abs().max()),
        tokens=checkpoint.shape[0] * checkpoint.shape[1],
    )
