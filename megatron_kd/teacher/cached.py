"""Distil from targets that a teacher stored once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from megatron_kd.config import ConfigError, ModelSection
from megatron_kd.teacher.source import (
    TeacherInputs,
    TeacherSource,
    check_checkpoint,
    check_layout,
    read_checkpoint_model,
)

if TYPE_CHECKING:
    from megatron_kd.parallel.groups import Groups
    from megatron_kd.teacher.teacher import Teacher


class Source(TeacherSource):
    """Source of stored targets, with a live teacher for missing ones where it is allowed."""

    def read_model(self) -> ModelSection | None:
        """See TeacherSource."""
        return read_checkpoint_model(self.config.teacher.checkpoint)

    def check_inputs(
        self, vocab_size: int, tokenizer_digest: str | None, world_size: int
    ) -> TeacherInputs:
        """See TeacherSource."""
        if self.config.teacher.checkpoint is None:
            return TeacherInputs(vocab_size, tokenizer_digest)
        inputs = check_checkpoint(self.config, vocab_size, tokenizer_digest)
        if self.config.teacher.falls_back:
            check_layout(self.config, inputs, world_size)
        return inputs

    def run_fingerprint(self, inputs: TeacherInputs) -> dict[str, Any]:
        """Return the identity of the cache."""
        from megatron_kd.cache import CacheError
        from megatron_kd.cache.reader import CacheFiles, read_identity

        try:
            identity = read_identity(CacheFiles(str(self.config.teacher.cache)))
        except CacheError as error:
            raise ConfigError(f"teacher.cache: {error}") from error
        return {"teacher.cache": json.loads(identity.to_json())}

    def weights_fingerprint(self, inputs: TeacherInputs) -> dict[str, Any]:
        """Return the identity of the cache, and the digest of the checkpoint if one is named."""
        from megatron_kd.cache import CacheReader
        from megatron_kd.checkpoint.store import checkpoint_digest

        identity = CacheReader(str(self.config.teacher.cache)).identity
        settings = {"teacher.cache": json.loads(identity.to_json())}
        if inputs.folder is not None:
            settings["teacher.checkpoint"] = checkpoint_digest(inputs.folder)
        return settings

    def weights_digest(self, inputs: TeacherInputs) -> str | None:
        """See TeacherSource."""
        from megatron_kd.teacher.runtime.online_teacher import digest_on_rank_zero

        return None if inputs.folder is None else digest_on_rank_zero(inputs.folder)

    def build(self, inputs: TeacherInputs, groups: Groups) -> Teacher:
        """See TeacherSource."""
        from megatron_kd.teacher.runtime.cached_teacher import CachedTeacher, open_cache
        from megatron_kd.teacher.runtime.separate_layout import build_in_layout

        reader, selection = open_cache(self.config, inputs, self.weights_digest(inputs))
        fallback = None
        if self.config.teacher.falls_back:
            fallback = build_in_layout(
                self.config, inputs, groups, reverse=False, equal_counts=False
            )
        return CachedTeacher(
            reader,
            device=groups.platform.device,
            decodes=groups.is_last_stage,
            fallback=fallback,
            selection=selection,
        )
