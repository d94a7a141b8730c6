"""Define the order in which a run reads the samples of a data set.

Where documents are cut into samples is a function of the data and the sequence length alone. Every
run over the data, whatever its seed, blend or length, reads the same samples, so that a teacher's
stored target for a sample serves all of them. The order is a function of the seed: each pass over a
prefix is a permutation of its samples drawn from (seed, prefix, pass). It depends neither on paths,
ranks, batch sizes or earlier runs, nor, without a blend, on the number of samples. A blend
distributes the prefixes over the complete run, steps * global_batch_size samples.

Two habits of megatron-core 0.16.1 are worked around here: its blended dataset needs a process group
whenever it has a cache folder, and its blend may request more samples than it built. For the others
see `prefix_samples`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_kd.config import ConfigError
from megatron_kd.data.index_cache import cache_key, check_arrays, complete_folder, global_rank
from megatron_kd.data.prefix_samples import (
    DatasetVocabulary,
    PrefixSamples,
    PrefixSource,
    quiet_megatron,
)
from megatron_kd.data.token_files import packed_length, read_index
from megatron_kd.parallel.collectives import raise_together


@dataclass(frozen=True, kw_only=True)
class DatasetRequest:
    """State which samples a run reads, and in which order.

    Attributes:
        prefixes: token files, already checked by `check_token_file`.
        weights: share of the samples from each prefix, > 0, on any scale; None for shares in
            proportion to tokens.
        num_samples: samples that the complete run consumes, steps * global_batch_size. The order of
            a blend depends on it.
        sequence_length: tokens per sample; a sample reads one more, for its last label.
        seed: of the order.
        index_cache: folder that all ranks see.
        end_of_document: id between documents; `mask_end_of_document` needs it.
        vocab_size: true vocabulary size.
        mask_end_of_document: no loss on the token after an end of document.
        name: what the configuration calls this data, for messages.
        repeat: True gives exactly `num_samples`, passing over the data as often as needed. False
            (validation, one prefix) gives at most one pass. Its order does not depend on
            `num_samples`, so that a smaller set is the beginning of a larger one.
        within_documents: tokens attend to their own document only. How samples are cut, and their
            order, stay the same.
    """

    prefixes: Sequence[str]
    weights: Sequence[float] | None = None
    num_samples: int
    sequence_length: int
    seed: int
    index_cache: str | Path
    end_of_document: int | None
    vocab_size: int
    mask_end_of_document: bool = False
    name: str = "data.train"
    repeat: bool = True
    within_documents: bool = False

    def __post_init__(self) -> None:
        if self.mask_end_of_document and self.end_of_document is None:
            raise ConfigError(
                "data.mask_end_of_document needs data.tokenizer, "
                "which says what the end-of-document id is"
            )
        num_prefixes = len(self.prefixes)
        if self.num_samples < 1 or not num_prefixes:
            raise ValueError("a dataset needs num_samples >= 1 and a prefix")
        if self.weights and len(self.weights) != num_prefixes:
            raise ValueError(f"{len(self.weights)} weights do not fit {num_prefixes} prefixes")
        if num_prefixes > 1 and not self.repeat:
            raise ValueError("a dataset that is read once at most has one prefix")


@dataclass(frozen=True)
class Blend:
    """Assign the samples of a run to prefixes.

    Attributes:
        prefixes: int16 [num_samples], the prefix that each sample comes from.
        positions: int64 [num_samples], its position in the run's order of that prefix.
    """

    prefixes: np.ndarray
    positions: np.ndarray


class TokenDataset(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Hold `len(dataset)` samples in a fixed order; reading one depends on no other.

    Attributes:
        name: what the configuration calls this data, for messages.
        sequence_length: tokens of one sample.
        num_tokens: ids in the data, over all prefixes.
        epochs: passes that the samples make over the data, the largest among the prefixes.
        within_documents: tokens attend to their own document only.
        prefixes: the samples of each prefix.
    """

    def __init__(
        self,
        name: str,
        prefixes: Sequence[PrefixSamples],
        blend: Blend | None,
        num_samples: int,
    ) -> None:
        self.name = name
        self.within_documents = prefixes[0].within_documents
        self.sequence_length = int(prefixes[0].samples.config.sequence_length)
        self.prefixes = prefixes
        self._blend = blend
        self._num_samples = num_samples
        sizes = [
            int(prefix.samples.dataset.sequence_lengths.sum(dtype=np.int64)) for prefix in prefixes
        ]
        counts = _samples_per_prefix(blend, len(prefixes), num_samples)
        self.num_tokens = sum(sizes)
        self.epochs = max(
            count * self.sequence_length / size for count, size in zip(counts, sizes, strict=True)
        )

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        """Return one sample.

        tokens, labels (already shifted) and position_ids are int64 [S]; loss_mask is fp32 [S], 0
        where the label does not count. marked_tokens is int64 [S], the tokens from which the
        sample's key is computed (`mark_starts` if tokens attend to their own document only).

        Raises:
            IndexError: `sample` is not in [0, len(self)).
        """
        prefix, index = self._locate(sample)
        return prefix.read(index)

    def describe(self, sample: int) -> str:
        """Return the origin of a sample's tokens, for messages."""
        prefix, index = self._locate(sample)
        _, documents = prefix.samples._query_document_sample_shuffle_indices(index)
        numbers = ", ".join(map(str, documents[:4])) + (", ..." if len(documents) > 4 else "")
        return f"sample {sample} of {self.name} (document {numbers} of {prefix.prefix})"

    def _locate(self, sample: int) -> tuple[PrefixSamples, int]:
        """Return the prefix of a sample and its index in a pass."""
        if not 0 <= sample < self._num_samples:
            raise IndexError(
                f"sample {sample} is outside the {self._num_samples} samples of {self.name}"
            )
        number, position = 0, sample
        if self._blend is not None:
            number = int(self._blend.prefixes[sample])
            position = int(self._blend.positions[sample])
        prefix = self.prefixes[number]
        return prefix, prefix.sample_index(position)


def build_dataset(request: DatasetRequest) -> TokenDataset:
    """Build the sample order of one data set.

    Every rank calls this with the same request. Global rank 0 writes the index arrays into the
    index cache; no file is written beside the data.

    Collectives:
        With torch.distributed initialised the ranks agree twice (`raise_together`), so that a
        failure on one rank is raised on all of them.

    Raises:
        ConfigError: the data has fewer than sequence_length + 1 tokens, or the index cache cannot
            be written, seen by all ranks, or read.
    """
    sources = _prefix_sources(request)
    with quiet_megatron():
        return _rank_zero_first(request, sources)


def _prefix_sources(request: DatasetRequest) -> list[PrefixSource]:
    end = -1 if request.end_of_document is None else request.end_of_document
    vocabulary = DatasetVocabulary(request.vocab_size, end)
    sources = []
    for prefix in request.prefixes:
        packed = packed_length(prefix) == request.sequence_length
        index = read_index(prefix)
        needed = request.sequence_length + (not packed)
        if index.num_tokens < needed:
            raise ConfigError(
                f"{request.name}: {prefix} has {index.num_tokens} tokens, but one sample needs "
                f"batch.sequence_length + 1 = {needed}: use more data or a smaller "
                "batch.sequence_length"
            )
        sources.append(
            PrefixSource(
                str(prefix),
                index.lengths,
                request.sequence_length,
                vocabulary,
                request.mask_end_of_document,
                packed,
            )
        )
    return sources


def _assemble(request: DatasetRequest, sources: Sequence[PrefixSource]) -> TokenDataset:
    cache = Path(request.index_cache)
    blend = None if len(sources) == 1 else _open_blend(request, sources, cache)
    prefixes = [
        PrefixSamples(
            source.prefix,
            source.open(cache),
            (request.seed, number) if request.repeat else None,
            request.within_documents,
        )
        for number, source in enumerate(sources)
    ]
    num_samples = request.num_samples
    if not request.repeat:
        num_samples = min(num_samples, len(prefixes[0]))
    return TokenDataset(request.name, prefixes, blend, num_samples)


def _open_blend(request: DatasetRequest, sources: Sequence[PrefixSource], cache: Path) -> Blend:
    num_samples = request.num_samples
    weights = request.weights or [source.lengths.sum(dtype=np.int64) for source in sources]
    shares = np.array(weights, dtype=np.float64)
    shares /= shares.sum()

    def write(folder: Path) -> None:
        from megatron.core.datasets.helpers import build_blending_indices

        prefixes = np.zeros(num_samples, dtype=np.int16)
        positions = np.zeros(num_samples, dtype=np.int64)
        build_blending_indices(prefixes, positions, shares, len(shares), num_samples, False)
        np.save(folder / "part.npy", prefixes)
        np.save(folder / "index.npy", positions)

    folder = cache / cache_key("blend", num_samples, shares.tolist())
    complete_folder(folder, write)
    check_arrays(folder, 2)
    return Blend(
        np.load(folder / "part.npy", mmap_mode="r"), np.load(folder / "index.npy", mmap_mode="r")
    )


def _samples_per_prefix(blend: Blend | None, num_prefixes: int, num_samples: int) -> list[int]:
    if blend is None:
        return [num_samples]
    counts: list[int] = np.bincount(blend.prefixes, minlength=num_prefixes).tolist()
    return counts


def _rank_zero_first(request: DatasetRequest, sources: Sequence[PrefixSource]) -> TokenDataset:
    """Assemble the dataset on rank 0, then on the others; a failure is raised on every rank."""
    dataset: TokenDataset | None = None
    for is_turn_of_rank_zero in (True, False):
        problem: Exception | None = None
        if (global_rank() == 0) == is_turn_of_rank_zero:
            try:
                dataset = _assemble(request, sources)
            except Exception as error:
                problem = error
        try:
            raise_together(None if problem is None else _message(problem), ConfigError)
        except ConfigError as shared:
            raise shared from problem
    assert dataset is not None
    return dataset


def _message(problem: Exception) -> str:
    if isinstance(problem, ConfigError):
        return str(problem)
    return f"the sample order cannot be made: {type(problem).__name__}: {problem}"
