"""A teacher on disk: targets that were stored once, found by the tokens they belong to."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_kd.cache import CacheError, CacheReader, MissingTarget
from megatron_kd.config import ConfigError
from megatron_kd.data.batches import Microbatch
from megatron_kd.data.dataset import TokenDataset
from megatron_kd.targets import Target
from megatron_kd.targets.keys import key_from_words, sample_key
from megatron_kd.targets.narrow import narrow
from megatron_kd.targets.select import TopSelection
from megatron_kd.targets.sparse import SparseTarget
from megatron_kd.teacher.source import TeacherSource

COVERAGE_SAMPLES = 1000


class CachedTeacher:
    """TeacherSource that reads a cache. Microbatches get their targets in the thread that reads their tokens ahead (`attach`).

    fallback: asked for microbatches with a sample that the cache does not hold; None: that is an error. With it every rank
    decodes, so that all agree on what is missing; without it only the ranks of the student's last stage do. part: what the run keeps of
    the stored entries; None: all.
    """

    def __init__(
        self,
        reader: CacheReader,
        *,
        decodes: bool,
        fallback: TeacherSource | None = None,
        part: TopSelection | None = None,
    ) -> None:
        self.reader, self.fallback, self.part = reader, fallback, part
        self._decodes = decodes or fallback is not None

    def attach(self, tokens: Tensor, keys: Tensor) -> SparseTarget | None:
        """The targets [S, B, K] of samples [B, S] named `keys` [B, 2]; None on ranks that need none.

        ConfigError where the cache lacks one and there is no fallback, or where a record is damaged.
        """
        if not self._decodes:
            return None
        try:
            found = self.reader.get_many([key_from_words(key) for key in keys])
            return found if self.part is None else narrow(found, self.part)
        except CacheError as error:
            if self.fallback is not None and isinstance(error, MissingTarget):
                return None
            advice = (
                "complete it with tools/cache_teacher.py"
                if isinstance(error, MissingTarget)
                else "find and redo what is damaged with tools/inspect_cache.py repair"
            )
            raise ConfigError(f"teacher.cache: {error}; {advice}") from error

    def attach_known(self, tokens: Tensor, keys: Tensor) -> SparseTarget | None:
        """The same for held-out data, where None stands for samples that the cache does not hold."""
        if self.reader.missing(key_from_words(key) for key in keys):
            return None
        return self.attach(tokens, keys)

    def targets(self, microbatches: Sequence[Microbatch]) -> list[Target | None]:
        """See TeacherSource. Collective only where the fallback is, and that only for what the cache does not hold."""
        found: list[Target | None] = [microbatch.target for microbatch in microbatches]
        absent = [place for place, target in enumerate(found) if target is None]
        if (
            self.fallback is not None
        ):  # asked by every rank, also for nothing: it may have to be asked by all together
            for place, target in zip(
                absent,
                self.fallback.targets([microbatches[place] for place in absent]),
                strict=True,
            ):
                found[place] = target
        return found


def check_coverage(reader: CacheReader, dataset: TokenDataset, first: int) -> None:
    """ConfigError where the cache lacks any of the next samples from `first` on that the run will read; no collective."""
    last = min(first + COVERAGE_SAMPLES, len(dataset))
    keys = [sample_key(dataset[sample]["marked_tokens"]) for sample in range(first, last)]
    missing = reader.missing(keys)
    if missing:
        sample = first + missing[0]
        reason = (
            "it was made from other data"
            if len(missing) == len(keys)
            else "it was made from a part of the data"
        )
        raise ConfigError(
            f"teacher.cache: {reader.storage.name} lacks {len(missing)} of the next {len(keys)} samples (the first is "
            f'{dataset.describe(sample)}): {reason}; complete it with tools/cache_teacher.py, or set teacher.on_miss = "online"'
        )
