"""Read targets that were stored once, by the keys of the samples that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import torch

from megatron_kd.cache import CacheError, CacheReader, MissingTarget
from megatron_kd.config import ConfigError, RunConfig
from megatron_kd.data.batches import Microbatch
from megatron_kd.data.dataset import TokenDataset
from megatron_kd.parallel.collectives import raise_together
from megatron_kd.targets import Target
from megatron_kd.targets.narrow import is_contained, narrow, parse_top_selection
from megatron_kd.targets.sample_keys import key_from_words, sample_key
from megatron_kd.targets.select import TopSelection
from megatron_kd.targets.sparse import SparseTarget
from megatron_kd.teacher.runtime.targets import cache_identity, configured_selection
from megatron_kd.teacher.source import TeacherInputs
from megatron_kd.teacher.teacher import Teacher

COVERAGE_SAMPLES = 1000


class _Prefetched(NamedTuple):
    """Targets of a coming step in CPU memory, which a thread is decoding."""

    step: int
    targets: Future[list[SparseTarget | None]]


class CachedTeacher(Teacher):
    """Read a cache, in a thread of its own, which decodes the next step while the student trains.

    Args:
        reader: the cache.
        device: where targets go.
        decodes: this rank needs targets: it holds the student's last stage.
        fallback: gives targets of samples that the cache does not hold; None: they are an error.
            With a fallback every rank decodes, so that all agree on which samples are missing.
        selection: what the run keeps of the stored entries; None: all.
    """

    def __init__(
        self,
        reader: CacheReader,
        *,
        device: torch.device,
        decodes: bool,
        fallback: Teacher | None = None,
        selection: TopSelection | None = None,
    ) -> None:
        self.reader, self.fallback, self.selection = reader, fallback, selection
        self._device = device
        self._decodes = decodes or fallback is not None
        self._decoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cached-targets")
        self._prefetched: _Prefetched | None = None

    def prefetch(self, upcoming: Future[list[Microbatch]] | None, *, step: int) -> None:
        """Decode the targets of a coming step in the background. See Teacher."""
        self._prefetched = None
        if self._decodes and upcoming is not None:
            targets = self._decoder.submit(lambda: self._decode_step(upcoming.result()))
            self._prefetched = _Prefetched(step, targets)

    def wait_for_prefetch(self, step: int) -> None:
        """See Teacher."""
        if self._prefetched is not None and self._prefetched.step == step:
            self._prefetched.targets.exception()

    def targets(
        self, microbatches: Sequence[Microbatch], *, step: int | None = None
    ) -> list[Target | None]:
        """See Teacher. Collective only as the fallback is, for what the cache does not hold.

        Raises:
            ConfigError: a sample of a training step is missing and there is no fallback, or a
                record is damaged.
        """
        targets: list[Target | None] = [
            None if target is None else target.map(self._to_device)
            for target in self._decoded(microbatches, step)
        ]
        if self.fallback is None:
            return targets
        missing = [number for number, target in enumerate(targets) if target is None]
        # Every rank calls it, also for no microbatch: it may be collective over the world.
        live = self.fallback.targets([microbatches[number] for number in missing])
        for number, target in zip(missing, live, strict=True):
            targets[number] = target
        return targets

    def check_data(self, dataset: TokenDataset, first_sample: int) -> None:
        """Check that the cache holds the next samples of the run. See Teacher."""
        if self.fallback is None:
            check_coverage(self.reader, dataset, first_sample)

    def _decoded(
        self, microbatches: Sequence[Microbatch], step: int | None
    ) -> list[SparseTarget | None]:
        """Return targets in CPU memory, from the prefetched step or from the cache."""
        if not self._decodes:
            return [None] * len(microbatches)
        prefetched = self._prefetched
        if step is not None and prefetched is not None and prefetched.step == step:
            self._prefetched = None
            return prefetched.targets.result()
        decode = self._decode_held_out if step is None else self._decode_step
        # In the same thread as what is prefetched: the reader serves one at a time.
        return self._decoder.submit(decode, microbatches).result()

    def _decode_step(self, microbatches: Sequence[Microbatch]) -> list[SparseTarget | None]:
        return [self._decode(microbatch) for microbatch in microbatches]

    def _decode_held_out(self, microbatches: Sequence[Microbatch]) -> list[SparseTarget | None]:
        """Decode as `_decode_step`, with None for microbatches that the cache lacks a sample of."""
        return [
            None if self.reader.missing(_sample_keys(microbatch)) else self._decode(microbatch)
            for microbatch in microbatches
        ]

    def _decode(self, microbatch: Microbatch) -> SparseTarget | None:
        """Return the targets [S, B, K] of a microbatch; None if a fallback must give them."""
        try:
            target = self.reader.get_many(_sample_keys(microbatch))
        except CacheError as error:
            missing = isinstance(error, MissingTarget)
            if missing and self.fallback is not None:
                return None
            remedy = (
                "complete it with tools/cache_teacher.py"
                if missing
                else "find and redo what is damaged with tools/inspect_cache.py repair"
            )
            raise ConfigError(f"teacher.cache: {error}; {remedy}") from error
        target = target if self.selection is None else narrow(target, self.selection)
        return target.map(torch.Tensor.pin_memory) if self._device.type == "cuda" else target

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, non_blocking=True)


def _sample_keys(microbatch: Microbatch) -> list[bytes]:
    return [key_from_words(key) for key in microbatch.sample_keys.cpu()]


def open_cache(
    config: RunConfig, inputs: TeacherInputs, teacher_digest: str | None
) -> tuple[CacheReader, TopSelection | None]:
    """Open teacher.cache and compare it with what the run needs.

    Args:
        config: the run.
        inputs: its checked teacher.
        teacher_digest: of teacher.checkpoint; None if the run names none: any teacher will do.

    Returns:
        The reader, and the selection that the run takes out of what is stored; None: all of it.

    Raises:
        ConfigError: on every rank, if the cache does not fit. Collective over the world.
    """
    reader, problem, contained = None, None, None
    try:
        reader = CacheReader(str(config.teacher.cache))
        stored = reader.identity
        needed = cache_identity(
            config,
            inputs,
            teacher=teacher_digest or stored.teacher,
            value_encoding=stored.value_encoding,
        )
        if teacher_digest is None:
            needed = replace(needed, teacher_step=stored.teacher_step)
        contained = _contained_selection(config, str(stored.selection))
        if contained is not None:
            needed = replace(needed, selection=stored.selection)
        stored.check(needed, reader.storage.name)
    except CacheError as error:
        problem = f"teacher.cache: {error}"
    raise_together(problem, ConfigError)
    assert reader is not None
    return reader, contained


def _contained_selection(config: RunConfig, stored_text: str) -> TopSelection | None:
    """Return the run's selection if a cache holds it as a part of larger targets, else None."""
    selection, stored = configured_selection(config), parse_top_selection(stored_text)
    if not isinstance(selection, TopSelection) or stored is None or selection == stored:
        return None
    return selection if is_contained(selection, stored) else None


def check_coverage(reader: CacheReader, dataset: TokenDataset, first_sample: int) -> None:
    """Check that a cache holds the next 1,000 samples that a run will read. No collective.

    Args:
        reader: the cache.
        dataset: the run's training data.
        first_sample: number of the next sample in the run's order.

    Raises:
        ConfigError: any of the samples is missing.
    """
    last = min(first_sample + COVERAGE_SAMPLES, len(dataset))
    keys = [sample_key(dataset[sample]["marked_tokens"]) for sample in range(first_sample, last)]
    missing = reader.missing(keys)
    if missing:
        sample = first_sample + missing[0]
        reason = (
            "it was made from other data"
            if len(missing) == len(keys)
            else "it was made from a part of the data"
        )
        raise ConfigError(
            f"teacher.cache: {reader.storage.name} lacks {len(missing)} of the next {len(keys)} "
            f"samples (the first is {dataset.describe(sample)}): {reason}; complete it with "
            'tools/cache_teacher.py, or set teacher.on_miss = "online"'
        )
