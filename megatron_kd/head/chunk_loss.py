"""Define the interface between the output head and a loss of its logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from torch import Tensor

from megatron_kd.head.logit_rows import ChunkRows
from megatron_kd.head.token_chunks import Chunk

State = TypeVar("State")


@dataclass(frozen=True)
class TokenValues:
    """Hold what a loss computes for each of the C tokens of a chunk.

    Attributes:
        total: [C], the value that is differentiated.
        reported: name -> [C], values that are reported only; the names are those of
            `ChunkLoss.reported`.
    """

    total: Tensor
    reported: dict[str, Tensor]


class ChunkLoss(ABC, Generic[State]):
    """Compute per-token losses of a chunk's logits and their gradient.

    One object serves one call of the head. The head measures every chunk once and in order, and
    asks for the logit gradient afterwards: at once, or later from logits that it has kept or
    multiplied again. All values are identical on every rank of the tensor-parallel group.

    Attributes:
        reported: names of the values that `measure` reports beside the total.
        recomputable: True if the gradient can be computed from logits that were multiplied again.
    """

    recomputable: ClassVar[bool] = True

    def __init__(self, reported: tuple[str, ...]) -> None:
        self.reported = reported

    @abstractmethod
    def measure(self, rows: ChunkRows, chunk: Chunk) -> tuple[TokenValues, State]:
        """Return the values of a chunk, and what its logit gradient needs besides the logits.

        Args:
            rows: this rank's logits of the chunk [C, n], which may be changed.
            chunk: addresses the chunk's tokens in tensors of the full sequence.
        """

    @abstractmethod
    def logit_gradient(
        self, rows: ChunkRows, state: State, *, start: int, upstream: Tensor | None = None
    ) -> Tensor:
        """Return d(sum of upstream * total) / d(logits) [C, n], in the memory of `rows`.

        Args:
            rows: logits of the chunk: those that `measure` has left or, for a recomputable loss,
                any columns of this rank's vocabulary, multiplied again. They are consumed.
            state: from `measure`.
            start: id of the first column of `rows`.
            upstream: [C], None for ones.
        """
