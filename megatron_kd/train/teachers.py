"""Which teacher a run file asks for, built; and the same teacher set up to be stored once for all."""

from __future__ import annotations

from dataclasses import replace

from megatron_kd.cache import CacheError, CacheIdentity, CacheReader
from megatron_kd.checkpoint.state import load_weights
from megatron_kd.checkpoint.store import checkpoint_digest
from megatron_kd.config import ConfigError, ParallelSection, RunConfig
from megatron_kd.data.batches import Attach
from megatron_kd.parallel.collectives import from_rank_zero, raise_together
from megatron_kd.parallel.groups import Groups, second_layout
from megatron_kd.parallel.shards import padded_vocab_size
from megatron_kd.targets import SampleSelection, Selection, TopSelection
from megatron_kd.teacher.cached import CachedTeacher
from megatron_kd.teacher.huggingface import HuggingFaceTeacher
from megatron_kd.teacher.online import OnlineTeacher
from megatron_kd.teacher.own_layout import OwnLayoutTeacher
from megatron_kd.teacher.source import NoTeacher, TeacherSource
from megatron_kd.train.foreign import use_zero3
from megatron_kd.train.inputs import Inputs


def selection_of(config: RunConfig) -> Selection:
    """How [distill] wants sparse targets to be chosen."""
    distill = config.distill
    if distill.num_draws is not None:
        return SampleSelection(distill.num_draws, config.train.seed, distill.temperature)
    return TopSelection(distill.top_k, distill.top_p, distill.min_k, distill.temperature)


def online_teacher(config: RunConfig, inputs: Inputs, groups: Groups) -> OnlineTeacher:
    """The teacher of teacher.checkpoint with its weights. Collective over the world."""
    assert inputs.teacher is not None
    folder, info = inputs.teacher
    teacher = OnlineTeacher(
        info.model_section(),
        config.parallel,
        groups,
        None if config.distill.dense else selection_of(config),
        precision=config.train.precision,
        vocab_size=inputs.vocab_size,
        sequence_length=config.batch.sequence_length,
        chunk_tokens=config.distill.chunk_tokens,
        within_documents=config.data.document_attention == "within",
    )
    load_weights(folder, teacher.models, what="teacher.checkpoint")
    return teacher


def _live_teacher(config: RunConfig, inputs: Inputs, groups: Groups, *, even: bool) -> TeacherSource:
    """The teacher of teacher.checkpoint in the student's layout, or in its own where the run file gives it one."""
    if not config.teacher.has_own_layout:
        return online_teacher(config, inputs, groups)
    tensor, pipeline, micro_batch_size = config.teacher_layout(groups.world_size)
    own = second_layout(groups, tensor=tensor, pipeline=pipeline, timeout_seconds=config.train.timeout_seconds)
    teacher_alone = config.model_copy(update={"parallel": ParallelSection(tensor=tensor, pipeline=pipeline)})
    return OwnLayoutTeacher(online_teacher(teacher_alone, inputs, own), groups, micro_batch_size=micro_batch_size, even=even)


def huggingface_teacher(config: RunConfig, inputs: Inputs, groups: Groups) -> HuggingFaceTeacher:
    """The teacher of a Hugging Face folder. Collective over the world; ConfigError on every rank where it cannot serve."""
    assert inputs.huggingface is not None
    return HuggingFaceTeacher(
        inputs.huggingface,
        groups,
        None if config.distill.dense else selection_of(config),
        precision=config.train.precision,
        vocab_size=inputs.vocab_size,
        rows=padded_vocab_size(inputs.vocab_size, config.model.vocab_size_multiple) // config.parallel.tensor,
        sequence_parallel=config.parallel.sequence_parallel,
        chunk_tokens=config.distill.chunk_tokens,
        zero3=use_zero3(config.teacher.shard_parameters, groups.world_size),
        offload=config.teacher.offload,
    )


def build_teacher(config: RunConfig, inputs: Inputs, groups: Groups) -> TeacherSource:
    """The teacher of [teacher]. Collective over the world; ConfigError on every rank where its cache does not fit."""
    if config.teacher.source == "none":
        return NoTeacher()
    if config.teacher.source == "online":
        return _live_teacher(config, inputs, groups, even=True)
    if config.teacher.source == "huggingface":
        return huggingface_teacher(config, inputs, groups)
    reader = _open_cache(config, inputs)
    fallback = _live_teacher(config, inputs, groups, even=False) if config.teacher.on_miss == "online" else None
    return CachedTeacher(reader, decodes=groups.is_last_stage, fallback=fallback)


def attach_of(teacher: TeacherSource, *, held_out: bool) -> Attach | None:
    """What gives microbatches their targets as they are read."""
    if not isinstance(teacher, CachedTeacher):
        return None
    return teacher.attach_known if held_out else teacher.attach


def identity_of(config: RunConfig, inputs: Inputs, *, teacher: str, value_encoding: str) -> CacheIdentity:
    """What a cache for this run is."""
    return CacheIdentity(
        teacher=teacher,
        tokenizer=inputs.digest,
        vocab_size=inputs.vocab_size,
        sequence_length=config.batch.sequence_length,
        selection=selection_of(config),
        value_encoding=value_encoding,
        teacher_step=inputs.teacher[1].step if inputs.teacher is not None else None,
        document_attention=config.data.document_attention,
    )


def _open_cache(config: RunConfig, inputs: Inputs) -> CacheReader:
    """teacher.cache, compared with what the run needs: its own teacher's, where the run names one."""
    digest = _teacher_digest(inputs)
    reader, problem = None, None
    try:
        reader = CacheReader(str(config.teacher.cache))
        own = reader.identity
        wanted = identity_of(config, inputs, teacher=digest or own.teacher, value_encoding=own.value_encoding)
        if digest is None:
            wanted = replace(wanted, teacher_step=own.teacher_step)
        own.check(wanted, reader.storage.name)
    except CacheError as error:
        problem = f"teacher.cache: {error}"
    raise_together(problem, ConfigError)
    assert reader is not None
    return reader


def _teacher_digest(inputs: Inputs) -> str | None:
    """Digest of teacher.checkpoint, computed by rank 0 for all; None where no checkpoint is named."""
    folder = inputs.huggingface or (inputs.teacher[0] if inputs.teacher is not None else None)
    if folder is None:
        return None
    # A model folder may hold anything beside the model.
    names = ("config.json", "*.safetensors") if inputs.huggingface is not None else ("*",)
    return from_rank_zero(lambda: checkpoint_digest(folder, names))


def build_extraction(config: RunConfig, inputs: Inputs, groups: Groups, *, value_encoding: str) -> tuple[TeacherSource, CacheIdentity]:
    """The teacher of a run file, ready to be stored, and the identity of its cache. Collective over the world."""
    digest = _teacher_digest(inputs)
    assert digest is not None
    build = huggingface_teacher if inputs.huggingface is not None else online_teacher
    return build(config, inputs, groups), identity_of(config, inputs, teacher=digest, value_encoding=value_encoding)
