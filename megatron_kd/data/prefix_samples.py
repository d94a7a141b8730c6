"""Cut the tokens of one prefix into samples with megatron-core's GPTDataset.

Three habits of megatron-core 0.16.1 are worked around here. Its cache of index arrays is keyed by
path instead of content, and is written in place. It reads that cache with pickles allowed. Its
padding id of -1 turns a -1 in the data into a silently masked 0.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from megatron_kd.data.index_cache import cache_key, check_arrays, complete_folder
from megatron_kd.data.token_files import COUNTS_FOR_LOSS, STARTS_DOCUMENT, read_roles
from megatron_kd.targets.sample_keys import mark_starts

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDataset

# No id of an integer token file up to int32, the widest that Megatron writes, can equal this.
_PADDING = int(np.iinfo(np.int64).min)


@dataclass(frozen=True)
class DatasetVocabulary:
    """Provide the attributes of a tokenizer that GPTDataset reads.

    It adds nothing to the cache key, because the order does not depend on it.
    """

    vocab_size: int
    eod: int
    pad: int = _PADDING
    unique_identifiers: ClassVar[dict[str, int]] = {}


@dataclass(frozen=True)
class PrefixSource:
    """Describe one prefix of a data set and everything that its samples depend on.

    Attributes:
        prefix: path of the token files.
        lengths: int32 [sequences], tokens of each sequence.
        sequence_length: tokens of one sample.
        vocabulary: what GPTDataset reads of the tokenizer.
        mask_end_of_document: no loss on the token after an end of document.
        packed: each sequence of the file is one sample of packed conversations.
    """

    prefix: str
    lengths: np.ndarray
    sequence_length: int
    vocabulary: DatasetVocabulary
    mask_end_of_document: bool
    packed: bool = False

    def open(self, cache: Path) -> GPTDataset:
        """Return the samples of one pass over this prefix, through a complete folder in `cache`."""
        digest = hashlib.sha256(self.lengths.tobytes()).hexdigest()
        packed = ["packed"] if self.packed else []
        folder = cache / cache_key("samples", digest, self.sequence_length, *packed)
        complete_folder(folder, lambda temporary: self._build(digest, temporary))
        check_arrays(folder, 3)
        return self._build(digest, folder)

    def _build(self, digest: str, folder: Path) -> GPTDataset:
        """Let megatron-core load the arrays in `folder`, or create them.

        It takes the digest in place of the path, so that its cache is keyed by content.
        """
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
            # A packed sample ends with a conversation. It needs no token after it, and its last
            # label does not count.
            add_extra_token_to_sequence=not self.packed,
        )
        tokens = GPTDataset.build_low_level_dataset(self.prefix, config)
        indices = np.arange(len(self.lengths), dtype=np.int32)
        return GPTDataset(tokens, digest, indices, None, Split.train, config)


class PrefixSamples:
    """Hold the samples of one pass over a prefix, and the order in which a run reads them.

    Args:
        prefix: path of the token files.
        samples: megatron-core's dataset over one pass.
        seed: of the order; None keeps the order in which samples are cut.
        within_documents: tokens attend to their own document only.
    """

    def __init__(
        self,
        prefix: str,
        samples: GPTDataset,
        seed: Sequence[int] | None,
        within_documents: bool = False,
    ) -> None:
        self.prefix, self.samples, self.within_documents = prefix, samples, within_documents
        self._roles = read_roles(prefix)
        self._seed = seed
        self._permutations: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> dict[str, torch.Tensor]:
        """Return sample `index` of a pass, in cutting order; see `TokenDataset.__getitem__`."""
        sample: dict[str, torch.Tensor] = self.samples[index]
        tokens = sample["tokens"]
        sample["marked_tokens"] = tokens
        if self._roles is None and not self.within_documents:
            return sample
        starts, counts = self._marks(index, len(tokens))
        sample["loss_mask"] = sample["loss_mask"] * counts
        if self.within_documents:
            sample["marked_tokens"] = mark_starts(tokens, starts)
        return sample

    def sample_index(self, position: int) -> int:
        """Return which sample of a pass the run reads as its `position`-th of this prefix."""
        epoch, index = divmod(position, len(self))
        if self._seed is None:
            return position
        if epoch not in self._permutations:
            # A run goes from pass to pass, and prefetching needs two of them at most.
            while len(self._permutations) > 1:
                del self._permutations[min(self._permutations)]
            generator = np.random.default_rng([*self._seed, epoch])
            self._permutations[epoch] = generator.permutation(len(self)).astype(np.uint32)
        return int(self._permutations[epoch][index])

    def _marks(self, index: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where documents start and which labels count.

        Returns:
            bool [S], true where a document starts except at 0, and fp32 [S], 1 where the label
            counts.
        """
        samples = self.samples
        shuffled = samples.shuffle_index[index]
        if not samples.config.add_extra_token_to_sequence:
            first, offset = samples.sample_index[shuffled]
            # megatron-core may state that a sample begins at the end of the sequence before.
            sequence = int(samples.document_index[first + (offset == size)])
            starts, counts = self._packed_roles(sequence, size)
        else:
            starts, counts = self._document_roles(shuffled, size)
        starts[0] = False
        return torch.from_numpy(starts[:size]), torch.from_numpy(counts[1:])

    def _packed_roles(self, sequence: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the roles of a sample that is one sequence; see `_document_roles`.

        The label after its last token does not count.
        """
        assert self._roles is not None
        roles = self._roles[sequence * size : (sequence + 1) * size]
        counts = np.zeros(size + 1, dtype=np.float32)
        counts[:-1] = roles & COUNTS_FOR_LOSS != 0
        return roles & STARTS_DOCUMENT != 0, counts

    def _document_roles(self, shuffled: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return bool and fp32 [S + 1]: whether a document starts, and whether the token counts.

        There is one token more than the sample has: the last label.
        """
        samples, tokens = self.samples, self.samples.dataset
        (first, offset), (last, _) = (
            samples.sample_index[shuffled],
            samples.sample_index[shuffled + 1],
        )
        sequences = samples.document_index[first : last + 1]
        lengths = tokens.sequence_lengths[sequences].astype(np.int64)
        starts, counts = np.zeros(size + 1, dtype=bool), np.ones(size + 1, dtype=np.float32)
        position = -int(offset)  # of the sequence's first token in the sample
        for sequence, length in zip(sequences, lengths, strict=True):
            begin, end = max(position, 0), min(position + int(length), size + 1)
            if self._roles is not None and end > begin:
                pointer = int(tokens.index.sequence_pointers[sequence])
                token = pointer // tokens.index.dtype_size + begin - position
                roles = self._roles[token : token + end - begin]
                starts[begin:end] = roles & STARTS_DOCUMENT != 0
                counts[begin:end] = roles & COUNTS_FOR_LOSS != 0
            if 0 <= position <= size:
                starts[position] = True
            position += int(length)
        return starts, counts


@contextmanager
def quiet_megatron() -> Iterator[None]:
    """Suppress megatron-core's import warnings and progress messages while the block runs."""
    logger = logging.getLogger("megatron.core")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
