"""Which teacher a run file asks for, built; and the same teacher set up to be stored once for all."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Collection
from dataclasses import replace

import torch

from megatron_kd.cache import CacheError, CacheIdentity, CacheReader
from megatron_kd.checkpoint.sharded_state import load_weights
from megatron_kd.checkpoint.store import checkpoint_digest
from megatron_kd.config import ConfigError, ParallelSection, RunConfig
from megatron_kd.data.batches import Attach
from megatron_kd.parallel.collectives import from_rank_zero, raise_together
from megatron_kd.parallel.groups import Groups, can_reverse_stages, start_separate_layout
from megatron_kd.parallel.vocab_shards import padded_vocab_size
from megatron_kd.planning.flops import flops_per_token
from megatron_kd.planning.placement import PipelineWork, Placement, best_placement
from megatron_kd.targets import SampleSelection, Selection, TopSelection
from megatron_kd.targets.narrow import is_contained, parse_top_selection
from megatron_kd.teacher.ahead import AheadTeacher
from megatron_kd.teacher.cached import CachedTeacher
from megatron_kd.teacher.huggingface import HuggingFaceTeacher
from megatron_kd.teacher.huggingface_folder import use_zero3
from megatron_kd.teacher.offload import Offloaded
from megatron_kd.teacher.online import OnlineTeacher
from megatron_kd.teacher.separate_layout import OwnLayoutTeacher
from megatron_kd.teacher.source import NoTeacher, TeacherSource
from megatron_kd.train.startup.input_checks import Inputs


def selection_of(config: RunConfig) -> Selection:
    """How [distill] wants sparse targets to be chosen."""
    distill = config.distill
    if distill.num_draws is not None:
        return SampleSelection(
            distill.num_draws,
            config.train.seed,
            distill.temperature,
            distill.draws,
            distill.draw_power,
        )
    # Where nothing of a target depends on the temperature, one is as good as another: one cache then serves all of them.
    measured = distill.top_p < 1.0 or distill.loss_tail != "renormalize"
    temperature = distill.temperature if measured and distill.truncate == "tempered" else 1.0
    return TopSelection(distill.top_k, distill.top_p, distill.min_k, temperature)


def online_teacher(
    config: RunConfig, inputs: Inputs, groups: Groups, *, layers: Collection[int] = ()
) -> OnlineTeacher:
    """The teacher of teacher.checkpoint with its weights; layers: whose outputs it keeps. Collective over the world."""
    assert inputs.teacher is not None
    folder, info = inputs.teacher
    _check_device(config, groups)
    teacher = OnlineTeacher(
        info.model_section(),
        config.parallel,
        groups,
        None if config.distill.dense else selection_of(config),
        precision=config.teacher.precision or config.train.precision,
        vocab_size=inputs.vocab_size,
        sequence_length=config.batch.sequence_length,
        chunk_tokens=config.distill.chunk_tokens,
        within_documents=config.data.document_attention == "within",
        layers=layers,
    )
    load_weights(folder, teacher.models, what="teacher.checkpoint")
    if config.teacher.offload:
        weights = Offloaded(teacher.models, groups.platform.device)
        teacher.resident = lambda: weights
    return teacher


def _check_device(config: RunConfig, groups: Groups) -> None:
    """ConfigError, on every rank, for what only a GPU can do."""
    cuda = groups.platform.is_cuda
    if config.teacher.offload and not cuda:
        raise ConfigError(
            "teacher.offload keeps the teacher in CPU memory, where this run on a CPU has it anyway: unset it"
        )
    if config.teacher.precision == "fp8":
        engine = importlib.util.find_spec("transformer_engine") is not None
        if not (cuda and engine and torch.cuda.get_device_capability() >= (8, 9)):
            raise ConfigError(
                'teacher.precision = "fp8" needs Transformer Engine and a GPU that multiplies in fp8 (compute capability 8.9 or later): '
                'set "bf16"'
            )


def _live_teacher(
    config: RunConfig, inputs: Inputs, groups: Groups, *, placement: Placement, even: bool
) -> TeacherSource:
    """The teacher of teacher.checkpoint in the student's layout, or in its own where it needs one."""
    if not config.teacher.has_separate_layout and not placement.reverse:
        return online_teacher(
            config,
            inputs,
            groups,
            layers={pair.teacher_layer for pair in config.distill.hidden_states},
        )
    tensor, pipeline, micro_batch_size = config.teacher_layout(groups.world_size)
    own = start_separate_layout(
        groups,
        tensor=tensor,
        pipeline=pipeline,
        timeout_seconds=config.train.timeout_seconds,
        reversed_stages=placement.reverse,
    )
    sequence_parallel = config.parallel.sequence_parallel and not config.teacher.has_separate_layout
    teacher_alone = config.model_copy(
        update={
            "parallel": ParallelSection(
                tensor=tensor, pipeline=pipeline, sequence_parallel=sequence_parallel
            )
        }
    )
    return OwnLayoutTeacher(
        online_teacher(teacher_alone, inputs, own),
        groups,
        micro_batch_size=micro_batch_size,
        even=even,
    )


def placement_of(config: RunConfig, inputs: Inputs, world_size: int) -> Placement:
    """When an online teacher runs, from teacher.overlap: the same on every rank."""
    model, own = inputs.teacher_model, config.teacher.has_separate_layout
    if (
        config.teacher.overlap == "none"
        or config.distill.dense
        or config.distill.hidden_states
        or model is None
    ):
        return Placement()
    tensor, pipeline, micro_batch_size = config.teacher_layout(world_size)
    length, parallel = config.batch.sequence_length, config.parallel
    ours = (
        flops_per_token(config.model, inputs.vocab_size, length, forward_only=True)
        * length
        * config.batch.micro_batch_size
    )
    theirs = (
        flops_per_token(model, inputs.vocab_size, length, forward_only=True)
        * length
        * micro_batch_size
    )
    forward = ours / (parallel.tensor * parallel.pipeline)
    recomputed = 3 if config.model.recompute == "full" else 2
    student = PipelineWork(
        world_size,
        parallel.tensor,
        parallel.pipeline,
        config.num_microbatches(world_size),
        forward,
        recomputed * forward,
        parallel.virtual_pipeline,
    )
    count = config.batch.global_batch_size * tensor * pipeline // (micro_batch_size * world_size)
    teacher = PipelineWork(world_size, tensor, pipeline, count, theirs / (tensor * pipeline))
    # Where the model promised 5 and 9 % (two ranks on gloo, tools/benchmarks), -3 and 4 % were measured: a small promise is not taken.
    gain = -math.inf if config.teacher.overlap == "drain" else 0.1
    return best_placement(
        student, teacher, same_layout=not own, can_reverse=can_reverse_stages(), gain=gain
    )


def huggingface_teacher(config: RunConfig, inputs: Inputs, groups: Groups) -> HuggingFaceTeacher:
    """The teacher of a Hugging Face folder. Collective over the world; ConfigError on every rank where it cannot serve."""
    assert inputs.huggingface is not None
    return HuggingFaceTeacher(
        inputs.huggingface,
        groups,
        None if config.distill.dense else selection_of(config),
        precision=config.teacher.precision or config.train.precision,
        vocab_size=inputs.vocab_size,
        rows=padded_vocab_size(inputs.vocab_size, config.model.vocab_size_multiple)
        // config.parallel.tensor,
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
        placement = placement_of(config, inputs, groups.world_size)
        live = _live_teacher(config, inputs, groups, placement=placement, even=True)
        return AheadTeacher(live) if placement.prefetch else live
    if config.teacher.source == "huggingface":
        return huggingface_teacher(config, inputs, groups)
    reader, wanted = _open_cache(config, inputs)
    fallback = None
    if config.teacher.on_miss == "online":
        fallback = _live_teacher(config, inputs, groups, placement=Placement(), even=False)
    return CachedTeacher(reader, decodes=groups.is_last_stage, fallback=fallback, part=wanted)


def attach_of(teacher: TeacherSource, *, held_out: bool) -> Attach | None:
    """What gives microbatches their targets as they are read."""
    if not isinstance(teacher, CachedTeacher):
        return None
    return teacher.attach_known if held_out else teacher.attach


def identity_of(
    config: RunConfig, inputs: Inputs, *, teacher: str, value_encoding: str
) -> CacheIdentity:
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


def _open_cache(config: RunConfig, inputs: Inputs) -> tuple[CacheReader, TopSelection | None]:
    """teacher.cache, compared with what the run needs: its own teacher's, where the run names one. Beside it the selection that the run
    takes out of what is stored, None where that is all of it."""
    digest = _teacher_digest(inputs)
    reader, problem, part = None, None, None
    try:
        reader = CacheReader(str(config.teacher.cache))
        own = reader.identity
        wanted = identity_of(
            config, inputs, teacher=digest or own.teacher, value_encoding=own.value_encoding
        )
        if digest is None:
            wanted = replace(wanted, teacher_step=own.teacher_step)
        selection, stored = selection_of(config), parse_top_selection(str(own.selection))
        if (
            isinstance(selection, TopSelection)
            and stored is not None
            and selection != stored
            and is_contained(selection, stored)
        ):
            part, wanted = selection, replace(wanted, selection=own.selection)
        own.check(wanted, reader.storage.name)
    except CacheError as error:
        problem = f"teacher.cache: {error}"
    raise_together(problem, ConfigError)
    assert reader is not None
    return reader, part


def _teacher_digest(inputs: Inputs) -> str | None:
    """Digest of teacher.checkpoint, computed by rank 0 for all; None where no checkpoint is named."""
    folder = inputs.huggingface or (inputs.teacher[0] if inputs.teacher is not None else None)
    if folder is None:
        return None
    # A model folder may hold anything beside the model.
    names = ("config.json", "*.safetensors") if inputs.huggingface is not None else ("*",)
    return from_rank_zero(lambda: checkpoint_digest(folder, names))


def build_extraction(
    config: RunConfig, inputs: Inputs, groups: Groups, *, value_encoding: str
) -> tuple[TeacherSource, CacheIdentity]:
    """The teacher of a run file, ready to be stored, and the identity of its cache. Collective over the world."""
    digest = _teacher_digest(inputs)
    assert digest is not None
    build = huggingface_teacher if inputs.huggingface is not None else online_teacher
    return build(config, inputs, groups), identity_of(
        config, inputs, teacher=digest, value_encoding=value_encoding
    )
