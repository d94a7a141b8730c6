"""The samples of a data set, cut by megatron-core's GPTDataset, and the order in which a run reads them.

Where documents are cut into samples is a function of the data and the sequence length alone, so that every run over the data,
whatever its seed, blend or length, reads the same samples, and what a teacher said of a sample once serves all of them. The
order is a function of the seed: each pass over a prefix is a permutation of its samples drawn from (seed, prefix, pass). It
depends neither on paths, ranks, batch sizes or earlier runs, nor, without a blend, on how many samples are asked for; a blend
deals out the prefixes over the complete run, steps * global_batch_size samples.

Four habits of megatron-core 0.16.1 are worked around: its cache of index arrays is keyed by path and not by content, is
written in place, and is read with pickles allowed; its blended dataset needs a process group whenever it has a cache folder;
its blend may ask for more samples than it built; and its padding id of -1 turns a -1 in the data into a silently masked 0.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import torch.distributed as dist

from megatron_kd.config import ConfigError
from megatron_kd.data.indexed import (
    COUNTS_FOR_LOSS,
    STARTS_DOCUMENT,
    packed_length,
    read_index,
    read_roles,
)
from megatron_kd.parallel.collectives import raise_together
from megatron_kd.storage.atomic_files import sync_path
from megatron_kd.targets.keys import mark_starts

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDataset

# No id of an integer token file up to int32, the widest that Megatron writes, can equal this.
_PADDING = int(np.iinfo(np.int64).min)


@dataclass(frozen=True)
class _Vocabulary:
    """The little of a tokenizer that GPTDataset asks for. It adds nothing to the cache key: the order does not depend on it."""

    vocab_size: int
    eod: int
    pad: int = _PADDING
    unique_identifiers: ClassVar[dict[str, int]] = {}


@dataclass(frozen=True)
class _Source:
    """One prefix of a data set and what its samples depend on."""

    prefix: str
    lengths: np.ndarray
    sequence_length: int
    vocabulary: _Vocabulary
    mask_end_of_document: bool
    packed: bool = False

    def open(self, cache: Path) -> GPTDataset:
        """The samples of one pass over this prefix, by way of a complete folder in `cache`."""
        digest = hashlib.sha256(self.lengths.tobytes()).hexdigest()
        folder = cache / _key(
            "samples", digest, self.sequence_length, *(["packed"] if self.packed else [])
        )
        _complete(folder, lambda temporary: self._build(digest, temporary))
        _refuse_damaged(folder, 3)
        return self._build(digest, folder)

    def _build(self, digest: str, folder: Path) -> GPTDataset:
        """megatron-core loads the arrays in `folder`, or makes them; the digest in place of the path keys them by content."""
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.utils import Split

        config = GPTDatasetConfig(
            random_seed=0,
            sequence_length=self.sequence_length,
            blend=([self.prefix], None),
            split="1,0,0",
            path_to_cache=str(folder),
            tokenizer=self.vocabulary,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=self.mask_end_of_document,
            create_attention_mask=False,
            # A packed sample ends with a conversation: it needs no token after it, and its last label does not count.
            add_extra_token_to_sequence=not self.packed,
        )
        tokens = GPTDataset.build_low_level_dataset(self.prefix, config)
        indices = np.arange(len(self.lengths), dtype=np.int32)
        return GPTDataset(tokens, digest, indices, None, Split.train, config)


class Part:
    """One prefix: the samples of one pass, and the order in which a run reads them pass after pass."""

    def __init__(
        self,
        prefix: str,
        samples: GPTDataset,
        seed: Sequence[int] | None,
        within_documents: bool = False,
    ) -> None:
        """seed: of the order, None: as they are cut. within_documents: tokens see their own document only."""
        self.within_documents = within_documents
        self._roles = read_roles(prefix)
        self.prefix, self.samples, self._seed = prefix, samples, seed
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index` of a pass, as it was cut; see `TokenDataset.__getitem__`."""
        found: dict[str, torch.Tensor] = self.samples[index]
        found["named"] = found["tokens"]
        if self._roles is None and not self.within_documents:
            return found
        starts, counts = self._marks(index, len(found["tokens"]))
        found["loss_mask"] = found["loss_mask"] * counts
        if self.within_documents:
            found["named"] = mark_starts(found["tokens"], starts)
        return found

    def _marks(self, index: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """bool [S]: where a document begins, save at 0; fp32 [S]: 1 where the label counts."""
        samples = self.samples
        if not samples.config.add_extra_token_to_sequence:
            first, offset = samples.sample_index[samples.shuffle_index[index]]
            # megatron-core may say that a sample begins at the end of the sequence before.
            return self._packed_marks(int(samples.document_index[first + (offset == size)]), size)
        place = samples.shuffle_index[index]
        (first, offset), (last, _) = samples.sample_index[place], samples.sample_index[place + 1]
        sequences = samples.document_index[first : last + 1]
        lengths = samples.dataset.sequence_lengths[sequences].astype(np.int64)
        # One token more than the sample has: the last label.
        starts, counts = np.zeros(size + 1, dtype=bool), np.ones(size + 1, dtype=np.float32)
        at = -int(offset)
        for sequence, length in zip(sequences, lengths, strict=True):
            begin, end = max(at, 0), min(at + int(length), size + 1)
            if self._roles is not None and end > begin:
                token = (
                    int(samples.dataset.index.sequence_pointers[sequence])
                    // samples.dataset.index.dtype_size
                    + begin
                    - at
                )
                roles = self._roles[token : token + end - begin]
                starts[begin:end] = roles & STARTS_DOCUMENT != 0
                counts[begin:end] = roles & COUNTS_FOR_LOSS != 0
            if 0 <= at <= size:
                starts[at] = True
            at += int(length)
        starts[0] = False
        return torch.from_numpy(starts[:size]), torch.from_numpy(counts[1:])

    def _packed_marks(self, sequence: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`_marks` of a sample that is one sequence of the file; the label after its last token does not count."""
        assert self._roles is not None
        roles = self._roles[sequence * size : (sequence + 1) * size]
        starts, counts = roles & STARTS_DOCUMENT != 0, np.zeros(size, dtype=np.float32)
        counts[:-1] = roles[1:] & COUNTS_FOR_LOSS != 0
        starts[0] = False
        return torch.from_numpy(starts), torch.from_numpy(counts)

    def place(self, nth: int) -> int:
        """Which sample of a pass the run reads as its `nth` of this prefix."""
        number, index = divmod(nth, len(self))
        if self._seed is None:
            return nth
        if number not in self._orders:
            while (
                len(self._orders) > 1
            ):  # a run goes from pass to pass; reading ahead needs two at most
                del self._orders[min(self._orders)]
            self._orders[number] = (
                np.random.default_rng([*self._seed, number])
                .permutation(len(self))
                .astype(np.uint32)
            )
        return int(self._orders[number][index])


class TokenDataset(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """`len(dataset)` samples in a fixed order; reading one needs no other.

    Attributes:
        name: what the configuration calls this data; used in messages.
        sequence_length: tokens of one sample.
        num_tokens: ids in the data, over all prefixes.
        epochs: passes that the samples make over the data, the largest among the prefixes.
        within_documents: tokens see their own document only.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[Part],
        blend: tuple[np.ndarray, np.ndarray] | None,
        num_samples: int,
    ) -> None:
        self.name = name
        self.within_documents = parts[0].within_documents
        self.sequence_length = int(parts[0].samples.config.sequence_length)
        self.parts = parts
        self._blend = blend
        self._num_samples = num_samples
        sizes = [int(part.samples.dataset.sequence_lengths.sum(dtype=np.int64)) for part in parts]
        counts = _counts(blend, len(parts), num_samples)
        self.num_tokens = sum(sizes)
        self.epochs = max(
            count * self.sequence_length / size for count, size in zip(counts, sizes, strict=True)
        )

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        """One sample: tokens, labels (shifted), position_ids: int64 [S]; loss_mask: fp32 [S], 0 where the label does not count.

        named: int64 [S], what the sample is called by (`mark_starts` of its tokens where they see their own document only).

        Raises:
            IndexError: `sample` is not in [0, len(self)).
        """
        part, index = self._place(sample)
        return part.read(index)

    def describe(self, sample: int) -> str:
        """Where the tokens of a sample come from, for messages."""
        part, index = self._place(sample)
        _, documents = part.samples._query_document_sample_shuffle_indices(index)
        listed = ", ".join(map(str, documents[:4])) + (", ..." if len(documents) > 4 else "")
        return f"sample {sample} of {self.name} (document {listed} of {part.prefix})"

    def _place(self, sample: int) -> tuple[Part, int]:
        if not 0 <= sample < self._num_samples:
            raise IndexError(
                f"sample {sample} is outside the {self._num_samples} samples of {self.name}"
            )
        number, nth = (
            (0, sample)
            if self._blend is None
            else (int(self._blend[0][sample]), int(self._blend[1][sample]))
        )
        part = self.parts[number]
        return part, part.place(nth)


def build_dataset(
    prefixes: Sequence[str],
    weights: Sequence[float] | None,
    *,
    num_samples: int,
    sequence_length: int,
    seed: int,
    index_cache: str | Path,
    end_of_document: int | None,
    vocab_size: int,
    mask_end_of_document: bool = False,
    name: str = "data.train",
    repeat: bool = True,
    within_documents: bool = False,
) -> TokenDataset:
    """Build the sample order of one data set; every rank calls this, with the same arguments.

    Global rank 0 writes the index arrays into `index_cache`, nothing is written beside the data. With torch.distributed
    initialised the ranks agree twice (`raise_together`), so that a failure on one is raised on all; else there is one process.

    Args:
        prefixes: token files, already checked by `check_token_file`; `name` is what the configuration calls them.
        weights: share of the samples from each prefix, > 0, any scale; None: in proportion to tokens.
        num_samples: samples the complete run consumes, steps * global_batch_size. A blend's order depends on it.
        seed: of the order.
        sequence_length: tokens per sample; a sample reads one more, for its last label.
        index_cache: folder seen by all ranks.
        end_of_document: id between documents; `mask_end_of_document` (no loss on what follows it) needs it.
        repeat: True gives exactly `num_samples`, passing over the data as often as needed. False (validation; one prefix) gives at
            most one pass; its order does not depend on `num_samples`, so a smaller set is the beginning of a larger one.
        within_documents: tokens see their own document only; what is cut into samples, and their order, stay the same.

    Raises:
        ConfigError: fewer than sequence_length + 1 tokens, or an index cache that cannot be written, seen by all ranks or read.
    """
    if mask_end_of_document and end_of_document is None:
        raise ConfigError(
            "data.mask_end_of_document needs data.tokenizer, which says what the end-of-document id is"
        )
    if (
        num_samples < 1
        or not prefixes
        or len(weights or prefixes) != len(prefixes)
        or (len(prefixes) > 1 and not repeat)
    ):
        raise ValueError(
            "build_dataset needs num_samples >= 1, a prefix, a weight for each (or None), and one prefix without repeat"
        )
    vocabulary = _Vocabulary(vocab_size, -1 if end_of_document is None else end_of_document)
    packed = [packed_length(prefix) == sequence_length for prefix in prefixes]
    lengths = [
        _usable_lengths(p, sequence_length + (not whole), name)
        for p, whole in zip(prefixes, packed, strict=True)
    ]
    sources = [
        _Source(str(p), n, sequence_length, vocabulary, mask_end_of_document, whole)
        for p, n, whole in zip(prefixes, lengths, packed, strict=True)
    ]
    shares = np.array(weights or [part.sum(dtype=np.int64) for part in lengths], dtype=np.float64)
    cache = Path(index_cache)

    def assemble() -> TokenDataset:
        blend = (
            None if len(sources) == 1 else _open_blend(shares / shares.sum(), num_samples, cache)
        )
        parts = [
            Part(
                source.prefix,
                source.open(cache),
                (seed, number) if repeat else None,
                within_documents,
            )
            for number, source in enumerate(sources)
        ]
        return TokenDataset(
            name, parts, blend, num_samples if repeat else min(num_samples, len(parts[0]))
        )

    with _quiet_megatron():
        return _rank_zero_first(assemble)


def _usable_lengths(prefix: str, needed: int, name: str) -> np.ndarray:
    index = read_index(prefix)
    if index.num_tokens < needed:
        raise ConfigError(
            f"{name}: {prefix} has {index.num_tokens} tokens, but one sample needs batch.sequence_length + 1 = {needed}: "
            "use more data or a smaller batch.sequence_length"
        )
    return index.lengths


def _open_blend(shares: np.ndarray, num_samples: int, cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """Which prefix each sample comes from, int16 [num_samples], and which sample of that prefix it is, int64 [num_samples]."""

    def write(folder: Path) -> None:
        from megatron.core.datasets.helpers import build_blending_indices

        part, index = np.zeros(num_samples, dtype=np.int16), np.zeros(num_samples, dtype=np.int64)
        build_blending_indices(part, index, shares, len(shares), num_samples, False)
        np.save(folder / "part.npy", part)
        np.save(folder / "index.npy", index)

    folder = cache / _key("blend", num_samples, shares.tolist())
    _complete(folder, write)
    _refuse_damaged(folder, 2)
    return np.load(folder / "part.npy", mmap_mode="r"), np.load(folder / "index.npy", mmap_mode="r")


def _counts(
    blend: tuple[np.ndarray, np.ndarray] | None, num_parts: int, num_samples: int
) -> list[int]:
    """Samples taken from each prefix, exactly."""
    return [num_samples] if blend is None else np.bincount(blend[0], minlength=num_parts).tolist()


def _key(kind: str, *values: object) -> str:
    return f"{kind}-{hashlib.sha256(json.dumps(values).encode()).hexdigest()[:24]}"


def _complete(folder: Path, write: Callable[[Path], object]) -> None:
    """Make sure `folder` exists with all its content: rank 0 writes it under another name, then renames it."""
    if folder.is_dir():
        return
    if _rank() != 0:
        raise ConfigError(
            f"rank {_rank()} does not see {folder}, which rank 0 wrote: set data.index_cache to a folder shared by all nodes"
        )
    # Not the process's number alone: in containers it comes again, beside what a killed run left and what another machine writes.
    temporary = folder.with_name(f".{folder.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for path in temporary.iterdir():
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
        try:
            os.rename(temporary, folder)
        except OSError:
            # A run beside this one was faster; its folder has the same content.
            if not folder.is_dir():
                raise
        sync_path(folder.parent)
    except OSError as error:
        raise ConfigError(
            f"cannot write {folder} ({error}): set data.index_cache to a writable folder with free space"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_damaged(folder: Path, num_arrays: int) -> None:
    """Open every array once without pickles, which megatron-core would run."""
    try:
        found = [np.load(path, mmap_mode="r", allow_pickle=False) for path in folder.glob("*.npy")]
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(
            f"the index cache {folder} is damaged ({error}): delete this folder and start again"
        ) from error
    if len(found) != num_arrays:
        raise ConfigError(
            f"the index cache {folder} has {len(found)} arrays in place of {num_arrays}: delete this folder and start again"
        )


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _rank_zero_first(assemble: Callable[[], TokenDataset]) -> TokenDataset:
    """Run `assemble` on rank 0, then on the others; what fails on one rank is raised on every rank."""
    dataset: TokenDataset | None = None
    for turn in (True, False):
        problem: Exception | None = None
        if (_rank() == 0) == turn:
            try:
                dataset = assemble()
            except Exception as error:
                problem = error
        try:
            raise_together(None if problem is None else _sentence(problem), ConfigError)
        except ConfigError as shared:
            raise shared from problem
    assert dataset is not None
    return dataset


def _sentence(problem: Exception) -> str:
    return (
        str(problem)
        if isinstance(problem, ConfigError)
        else f"the sample order cannot be made: {type(problem).__name__}: {problem}"
    )


@contextmanager
def _quiet_megatron() -> Iterator[None]:
    """Keep megatron-core's import warnings and progress messages out of the run's output, for this call only."""
    logger = logging.getLogger("megatron.core")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
