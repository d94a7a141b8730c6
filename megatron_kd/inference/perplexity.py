"""Measure losses and calibration of a frozen model on token files, alone or beside a teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kd.data.batches import BatchLayout, BatchSource, Microbatch
from megatron_kd.data.dataset import DatasetRequest, build_dataset
from megatron_kd.data.token_files import tokens_per_byte
from megatron_kd.inference.frozen_model import FrozenModel
from megatron_kd.losses import DenseTeacher, linear_divergence, linear_kd_cross_entropy
from megatron_kd.parallel.collectives import all_gather
from megatron_kd.targets import TopSelection, linear_targets
from megatron_kd.telemetry.calibration_error import (
    FINE_BINS,
    adaptive_calibration_error,
    calibration_sums,
    expected_calibration_error,
)

# Sums before the bins of the calibration error: loss, correct predictions, KL, agreement, the
# teacher's loss, tokens.
_NUM_TOTALS = 6


@dataclass(frozen=True)
class HeldOutSet:
    """Name held-out tokens and how they are batched.

    Attributes:
        prefix: Path of the token file without .bin/.idx.
        name: Name of the set.
        sequence_length: Tokens of a sequence.
        batch_size: Sequences of one forward pass.
        index_cache: Folder for the index files of the sample order.
        max_sequences: Measure at most this many sequences; None for all.
    """

    prefix: str
    name: str
    sequence_length: int
    batch_size: int
    index_cache: Path
    max_sequences: int | None = None


@dataclass(frozen=True)
class Perplexity:
    """Hold what was measured: means over the predicted tokens.

    Attributes:
        cross_entropy: Nats per token.
        tokens: Number of predicted tokens.
        accuracy: Share of tokens whose most probable id is the label.
        calibration_error: In [0, 1], see telemetry/calibration_error.py.
        adaptive_calibration_error: In [0, 1], see telemetry/calibration_error.py.
        teacher_kl: KL(teacher || model) of whole distributions at temperature 1, nats. None without
            a teacher, as are the next two.
        teacher_agreement: Share of tokens with the same most probable id in both models.
        teacher_cross_entropy: Cross-entropy of the teacher, nats per token.
    """

    cross_entropy: float
    tokens: int
    accuracy: float
    calibration_error: float
    adaptive_calibration_error: float
    teacher_kl: float | None = None
    teacher_agreement: float | None = None
    teacher_cross_entropy: float | None = None

    @property
    def perplexity(self) -> float:
        """Return exp(cross_entropy), or infinity if that exceeds a float."""
        return math.exp(self.cross_entropy) if self.cross_entropy < 700 else math.inf

    def describe(self, prefix: str) -> dict[str, Any]:
        """Return all results by name, for JSON.

        Bits per byte are included if the description of the token file counts bytes of text.
        """
        bytes_ratio = tokens_per_byte(prefix)
        bits_per_byte = (
            {}
            if bytes_ratio is None
            else {"bits_per_byte": self.cross_entropy / math.log(2) * bytes_ratio}
        )
        optional = {
            "accuracy": self.accuracy,
            "calibration_error": self.calibration_error,
            "adaptive_calibration_error": self.adaptive_calibration_error,
            "teacher_kl": self.teacher_kl,
            "teacher_agreement": self.teacher_agreement,
            "teacher_cross_entropy": self.teacher_cross_entropy,
        }
        return {
            "perplexity": self.perplexity,
            "cross_entropy": self.cross_entropy,
            **bits_per_byte,
            **{name: value for name, value in optional.items() if value is not None},
            "tokens": self.tokens,
            "data": prefix,
        }


def measure(
    model: FrozenModel, held_out: HeldOutSet, teacher: FrozenModel | None = None
) -> Perplexity:
    """Measure every whole sequence of a set once. Collective over the world.

    Each sequence is run by itself. Logits exist for one chunk of tokens only. Sums and counts are
    reduced once, at the end.

    Args:
        model: The model.
        held_out: The tokens.
        teacher: A model of the same vocabulary to compare with, on the same groups.
    """
    groups = model.groups
    global_batch = held_out.batch_size * groups.data_size
    source = held_out_batches(model, held_out)
    sums = torch.zeros(
        _NUM_TOTALS + 3 * FINE_BINS, dtype=torch.float64, device=groups.platform.device
    )
    teacher_weight = _teacher_weight(model, teacher)
    for index in range(source.num_batches):
        for microbatch in source.microbatches(index * global_batch):
            hidden = model.hidden(microbatch.tokens)
            teacher_hidden = None if teacher is None else teacher.hidden(microbatch.tokens)
            if hidden is None:
                continue
            dense = None
            if teacher_hidden is not None and teacher_weight is not None:
                dense = DenseTeacher(teacher_hidden, teacher_weight)
            microbatch_sums = _sums(model, hidden, dense, microbatch)
            if groups.reports_loss:
                sums += microbatch_sums
    dist.all_reduce(sums)
    return _means(sums, has_teacher=teacher is not None)


def held_out_batches(model: FrozenModel, held_out: HeldOutSet) -> BatchSource:
    """Return the microbatches of this rank's replica. Every sequence comes once."""
    groups = model.groups
    request = DatasetRequest(
        prefixes=[held_out.prefix],
        num_samples=held_out.max_sequences or 2**40,
        sequence_length=held_out.sequence_length,
        seed=0,
        index_cache=held_out.index_cache,
        end_of_document=None,
        vocab_size=model.vocab_size,
        mask_end_of_document=False,
        name=held_out.name,
        repeat=False,
    )
    return BatchSource(
        build_dataset(request),
        BatchLayout(
            global_batch_size=held_out.batch_size * groups.data_size,
            micro_batch_size=held_out.batch_size,
            data_parallel_rank=groups.data_rank,
            data_parallel_size=groups.data_size,
        ),
        vocab_size=model.vocab_size,
        device=groups.platform.device,
        pad_last=True,
    )


def _means(sums: Tensor, *, has_teacher: bool) -> Perplexity:
    loss, correct, kl, agreement, teacher_loss, tokens = sums[:_NUM_TOTALS].tolist()
    bins = sums[_NUM_TOTALS:].view(3, FINE_BINS).cpu()
    return Perplexity(
        cross_entropy=loss / tokens,
        tokens=int(tokens),
        accuracy=correct / tokens,
        calibration_error=expected_calibration_error(bins),
        adaptive_calibration_error=adaptive_calibration_error(bins),
        teacher_kl=kl / tokens if has_teacher else None,
        teacher_agreement=agreement / tokens if has_teacher else None,
        teacher_cross_entropy=teacher_loss / tokens if has_teacher else None,
    )


@torch.no_grad()
def _sums(
    model: FrozenModel, hidden: Tensor, teacher: DenseTeacher | None, microbatch: Microbatch
) -> Tensor:
    """Return the sums of one microbatch, fp64 [_NUM_TOTALS + 3 FINE_BINS].

    They are the same on every rank of the last stage's tensor group.

    Args:
        model: The model.
        hidden: Its final hidden states [S, B, H].
        teacher: The teacher's, or None.
        microbatch: Labels and loss mask.
    """
    labels, mask = microbatch.labels.T.contiguous(), microbatch.loss_mask.T.contiguous()
    head: dict[str, Any] = {"vocab_size": model.vocab_size, "tp_group": model.groups.tp}
    ce = linear_kd_cross_entropy(hidden, model.weight(), labels, None, alpha=0.0, **head).ce
    top = linear_targets(hidden, model.weight(), TopSelection(1), **head)
    top_ids = top.indices[..., 0]
    is_correct = top_ids == labels
    zero = torch.zeros_like(mask)
    teacher_values = [zero, zero, zero]
    if teacher is not None:
        teacher_values = _teacher_values(model, hidden, teacher, labels, top_ids)
    weight = mask.double() * (labels >= 0)
    per_token = (ce, is_correct, *teacher_values, torch.ones_like(mask))
    totals = torch.stack([(values.double() * weight).sum() for values in per_token])
    confidence = top.logprobs[..., 0].exp()
    bins = calibration_sums(confidence.flatten(), is_correct.flatten(), weight.flatten())
    return torch.cat([totals, bins.flatten()])


def _teacher_values(
    model: FrozenModel, hidden: Tensor, teacher: DenseTeacher, labels: Tensor, top_ids: Tensor
) -> list[Tensor]:
    """Return KL(teacher || model), agreement and the teacher's loss, fp32 [S, B] each.

    Args:
        model: The model.
        hidden: Its final hidden states [S, B, H].
        teacher: The teacher's hidden states and weight.
        labels: int64 [S, B].
        top_ids: The model's most probable ids [S, B].
    """
    head: dict[str, Any] = {"vocab_size": model.vocab_size, "tp_group": model.groups.tp}
    # The head needs both models in one dtype: the wider one.
    dtype = torch.promote_types(hidden.dtype, teacher.hidden.dtype)
    kl = linear_divergence(
        hidden.to(dtype),
        model.weight().to(dtype),
        labels,
        DenseTeacher(teacher.hidden.to(dtype), teacher.weight.to(dtype)),
        divergence="forward_kl",
        alpha=1.0,
        **head,
    ).kd
    top = linear_targets(teacher.hidden, teacher.weight, TopSelection(1), **head)
    teacher_ce = linear_kd_cross_entropy(
        teacher.hidden, teacher.weight, labels, None, alpha=0.0, **head
    ).ce
    return [kl, (top.indices[..., 0] == top_ids).to(kl.dtype), teacher_ce]


def _teacher_weight(model: FrozenModel, teacher: FrozenModel | None) -> Tensor | None:
    """Return the teacher's output weight [V/tp, H_t] with the ids of this rank's part of the model.

    None except on the last stage. Vocabularies that are padded to different sizes are split at
    different ids. Then the weight is gathered over the tensor group and split again.
    """
    if teacher is None or not model.groups.is_last_stage:
        return None
    weight, rows = teacher.weight(), len(model.weight())
    if len(weight) == rows:
        return weight
    full_weight = all_gather(weight, model.groups.tp).flatten(0, 1)[: model.vocab_size]
    shard = full_weight[model.groups.tensor_rank * rows :][:rows]
    return torch.nn.functional.pad(shard, (0, 0, 0, rows - len(shard)))
