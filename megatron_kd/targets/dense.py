"""Hold dense distillation targets: the teacher's final hidden states and output weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_kd.targets.sparse import SparseTarget


@dataclass(frozen=True)
class DenseTarget:
    """Hold a teacher's whole distributions for some tokens, as the factors of its logits.

    No [tokens, vocabulary] tensor is stored: the loss multiplies the factors chunk by chunk. No
    gradient reaches either of them.

    Attributes:
        hidden: [S, B, H_t] or [N, H_t], any float type. The teacher's final hidden states, laid
            out like the student's: replicated over the tensor-parallel group, or this rank's slice
            of S under sequence parallelism.
        weight: [V_t/tp, H_t], the type of `hidden`. The teacher's output weight. Each rank must
            hold the same ids of the true vocabulary as of the student's weight; the padding behind
            them may differ.
    """

    hidden: Tensor
    weight: Tensor


Target = SparseTarget | DenseTarget


def same_vocabulary_ranges(rows: int, other_rows: int, vocab_size: int) -> bool:
    """Return True if shards of `rows` and of `other_rows` rows hold the same ids on every rank."""
    return rows == other_rows or min(rows, other_rows) >= vocab_size
