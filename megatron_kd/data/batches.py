"""Cut microbatches out of a data set as a function of the number of samples consumed.

So stopping, resuming and another layout change nothing. Step n of a run covers the samples
consumed .. consumed + global_batch_size - 1 of the order made in `dataset.py`. Shapes: B
micro_batch_size, S sequence_length.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import torch

from megatron_kd.config import ConfigError
from megatron_kd.data.dataset import TokenDataset
from megatron_kd.targets.sample_keys import mark_starts, sample_keys, unmark_starts


@dataclass(frozen=True)
class Microbatch:
    """Hold the data of one forward pass.

    It is the same on every tensor- and pipeline-parallel rank of a data-parallel rank.

    Attributes:
        tokens: int64 [B, S].
        labels: int64 [B, S], the next token of each (already shifted); -100 where the loss does
            not count.
        loss_mask: fp32 [B, S], 1 where the loss counts, else 0.
        position_ids: int64 [B, S], 0 .. S-1, or counted from the start of the token's document.
        sample_ids: int64 [B], number of each sequence in the run's sample order; -1 for one that
            only fills up the last batch.
        sample_keys: int64 [B, 2], key of each sequence's tokens, and of its documents where they
            matter (`targets.sample_keys`).
        documents: int64 [B, S], the number of each token's document in its sequence if tokens see
            their own document only; else None.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    sample_ids: torch.Tensor
    sample_keys: torch.Tensor
    documents: torch.Tensor | None = None

    @staticmethod
    def of(  # noqa: PLR0913 - one argument per tensor
        marked_tokens: torch.Tensor,
        labels: torch.Tensor,
        loss_mask: torch.Tensor,
        sample_ids: torch.Tensor,
        *,
        within_documents: bool,
        keys: torch.Tensor | None = None,
    ) -> Microbatch:
        """Make a microbatch from a data set's tensors.

        Args:
            marked_tokens: int64 [B, S], tokens with document starts marked (see `TokenDataset`).
            labels: int64 [B, S].
            loss_mask: fp32 [B, S].
            sample_ids: int64 [B].
            within_documents: tokens see their own document only.
            keys: int64 [B, 2], the sample keys if they are known; None: computed here.
        """
        tokens, starts = unmark_starts(marked_tokens)
        positions = (
            torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens).contiguous()
        )
        documents = None
        if within_documents:
            documents = starts.long().cumsum(1)
            positions = positions - (positions * starts).cummax(1).values
        keys = sample_keys(marked_tokens) if keys is None else keys
        return Microbatch(tokens, labels, loss_mask, positions, sample_ids, keys, documents)

    @property
    def marked_tokens(self) -> torch.Tensor:
        """Return int64 [B, S], the tokens, with their documents' starts marked if they matter."""
        if self.documents is None:
            return self.tokens
        starts = self.documents.diff(
            dim=1, prepend=self.documents.new_zeros(len(self.documents), 1)
        )
        return mark_starts(self.tokens, starts > 0)

    def attention_mask(self) -> torch.Tensor | None:
        """Return bool [B, 1, S, S], true where a query (dim 2) sees a key (dim 3).

        None where attention is causal and nothing else.
        """
        if self.documents is None:
            return None
        same = self.documents.unsqueeze(2) == self.documents.unsqueeze(1)
        return same.tril().unsqueeze(1)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Microbatch:
        """Return the microbatch with `function` applied to every tensor."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        mapped: dict[str, Any] = {
            name: None if tensor is None else function(tensor) for name, tensor in tensors.items()
        }
        return Microbatch(**mapped)

    def to(self, device: torch.device) -> Microbatch:
        """Return the microbatch on `device`; copies from pinned memory do not wait."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class BatchLayout:
    """Describe how global batches are divided into microbatches.

    Attributes:
        global_batch_size: samples of one step over all ranks.
        micro_batch_size: samples of one microbatch, B.
        data_parallel_rank: of this process, in [0, data_parallel_size).
        data_parallel_size: ranks that share a global batch.

    Raises:
        ConfigError: the batch sizes do not divide.
    """

    global_batch_size: int
    micro_batch_size: int
    data_parallel_rank: int = 0
    data_parallel_size: int = 1

    def __post_init__(self) -> None:
        per_round = self.micro_batch_size * self.data_parallel_size
        if self.global_batch_size % per_round:
            raise ConfigError(
                f"batch.global_batch_size ({self.global_batch_size}) must be a multiple of "
                "batch.micro_batch_size * data-parallel size = "
                f"{self.micro_batch_size} * {self.data_parallel_size} = {per_round}"
            )
        if not 0 <= self.data_parallel_rank < self.data_parallel_size:
            raise ValueError(
                f"data_parallel_rank {self.data_parallel_rank} is not in "
                f"[0, {self.data_parallel_size})"
            )

    def samples(self, consumed_samples: int) -> list[range]:
        """Return the samples of this rank's microbatches of the step at `consumed_samples`."""
        size = self.micro_batch_size
        rounds = self.global_batch_size // (size * self.data_parallel_size)
        firsts = (
            consumed_samples + (number * self.data_parallel_size + self.data_parallel_rank) * size
            for number in range(rounds)
        )
        return [range(first, first + size) for first in firsts]


class BatchSource:
    """Cut global batches out of a data set for one data-parallel rank.

    The result depends only on the arguments. While a step runs, a thread reads the samples of
    the step after it; asking for another position drops that work.

    Args:
        dataset: samples 0 .. len(dataset) - 1.
        layout: of global batches.
        vocab_size: true vocabulary size; ids are checked against it at every read.
        device: where the microbatches go.
        pad_last: fill an incomplete last global batch with sequences whose loss does not count,
            in place of an error.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        layout: BatchLayout,
        *,
        vocab_size: int,
        device: torch.device | str,
        pad_last: bool = False,
    ) -> None:
        self.dataset = dataset
        self._layout = layout
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._pad_last = pad_last
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._prefetched: tuple[int, Future[list[Microbatch]]] | None = None

    @property
    def num_batches(self) -> int:
        """Return the global batches of the data set; an incomplete last one needs `pad_last`."""
        size = self._layout.global_batch_size
        samples = len(self.dataset) + (size - 1 if self._pad_last else 0)
        return samples // size

    def microbatches(self, consumed_samples: int) -> list[Microbatch]:
        """Return this rank's microbatches of the step that starts at `consumed_samples`.

        Microbatch m holds the samples
        consumed_samples + (m * data_parallel_size + data_parallel_rank) * B + i, i in 0 .. B-1.

        Raises:
            ConfigError: the data ends before the global batch does, or holds an id outside the
                vocabulary.
        """
        size = self._layout.global_batch_size
        if not self._contains_batch(consumed_samples):
            raise ConfigError(
                f"{self.dataset.name} has {len(self.dataset)} samples, but samples "
                f"{consumed_samples} to {consumed_samples + size - 1} were asked for: build it for "
                "steps * global_batch_size samples"
            )
        prefetched, self._prefetched = self._prefetched, None
        if prefetched is not None and prefetched[0] == consumed_samples:
            microbatches = prefetched[1].result()
        else:
            if prefetched is not None:
                prefetched[1].cancel()
            microbatches = self._read(consumed_samples)
        following = consumed_samples + size
        if self._contains_batch(following):
            self._prefetched = (following, self._reader.submit(self._read, following))
        return [microbatch.to(self._device) for microbatch in microbatches]

    def upcoming(self) -> Future[list[Microbatch]] | None:
        """Return the microbatches after those returned last, in CPU memory once they are read.

        None where the data ends. The future holds the error where they cannot be read.
        """
        return None if self._prefetched is None else self._prefetched[1]

    def _contains_batch(self, consumed: int) -> bool:
        last = consumed if self._pad_last else consumed + self._layout.global_batch_size - 1
        return 0 <= consumed and last < len(self.dataset)

    def _read(self, consumed: int) -> list[Microbatch]:
        return [self._microbatch(samples) for samples in self._layout.samples(consumed)]

    def _microbatch(self, samples: range) -> Microbatch:
        """Read samples into CPU memory, pinned if they go on to a GPU."""
        exists = [sample < len(self.dataset) for sample in samples]
        items = [
            self.dataset[sample if present else 0]
            for sample, present in zip(samples, exists, strict=True)
        ]
        tokens, labels, loss_mask, marked_tokens = (
            torch.stack([item[key] for item in items])
            for key in ("tokens", "labels", "loss_mask", "marked_tokens")
        )
        self._check_range(samples, tokens, labels)
        real = torch.tensor(exists)
        loss_mask = loss_mask * real.unsqueeze(1)
        batch = Microbatch.of(
            marked_tokens,
            labels.masked_fill(loss_mask == 0, -100),
            loss_mask,
            torch.tensor(list(samples)).masked_fill(~real, -1),
            within_documents=self.dataset.within_documents,
        )
        return batch.map(torch.Tensor.pin_memory) if self._device.type == "cuda" else batch

    def _check_range(self, samples: range, tokens: torch.Tensor, labels: torch.Tensor) -> None:
        ids = torch.cat((tokens, labels[:, -1:]), dim=1)
        invalid = (ids < 0) | (ids >= self._vocab_size)
        if invalid.any():
            number, position = (int(value) for value in invalid.nonzero()[0])
            raise ConfigError(
                f"{self.dataset.describe(samples[number])} holds token id "
                f"{int(ids[number, position])} at position {position}, outside the vocabulary of "
                f"{self._vocab_size} ids: make the data with the run's tokenizer"
            )
