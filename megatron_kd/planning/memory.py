"""Estimate the peak memory of each rank of a run, part by part.

Weights, gradients and optimizer state exist all the time. Of the temporary memory, the planner
computes every phase of a step that can have the peak, and takes the largest: forward and backward
of the head and of a layer with the most microbatches in flight, the gradient of the embedding, the
reduction of gradients, the optimizer, the teacher's forward pass and the exchange of targets.
The bytes that a layer keeps were read off autograd's saved tensors (CPU) and follow Korthikanti
et al., arXiv 2205.05198, for megatron-core's modules. Optimizer states follow Rajbhandari et al.,
arXiv 1910.02054 (ZeRO-1).

Symbols: n tokens of a microbatch, H hidden size, Q and K widths of queries and keys, F of the MLP,
V vocabulary, t tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_kd.config.hidden_state_pairs import projections_of
from megatron_kd.config.sections.hidden_states_pair import HiddenStatesPair
from megatron_kd.parallel.pipeline_stages import stage_of_layer
from megatron_kd.planning.head_memory import student_head_bytes, teacher_head_bytes
from megatron_kd.planning.parameters import rank_parameters
from megatron_kd.planning.planned_run import PlannedRun
from megatron_kd.planning.shape import ELEMENT_BYTES, microbatches_in_flight

PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "head",
    "temporaries",
    "communication",
    "teacher weights",
    "teacher activations",
    "hidden states",
    "targets",
    "batches",
    "framework",
)
# Bytes of a token of a batch: token, label and position of 8 bytes and a mask of 4.
_BATCH_TOKEN_BYTES = 28

Parts = dict[str, float]


@dataclass(frozen=True)
class RankMemory:
    """Hold the memory of a rank of one pipeline stage of the student.

    Attributes:
        stage: index of the pipeline stage.
        parameters: trained weights on the rank, projections of distill.hidden_states included.
        kept_activations: bytes that the layers keep with the most microbatches in flight.
        parts: bytes by name (PARTS) at the peak.
        moment: name of the phase of the step that has the peak.
    """

    stage: int
    parameters: int
    kept_activations: float
    parts: Parts
    moment: str

    @property
    def total(self) -> float:
        """Return the bytes of all parts."""
        return sum(self.parts.values())


def run_memory(run: PlannedRun, world_size: int, *, framework: float = 0.0) -> list[RankMemory]:
    """Return the memory of the ranks of each pipeline stage of the student.

    Args:
        run: the run; its teacher counts where it is live.
        world_size: number of ranks.
        framework: bytes of CUDA context, libraries and communication buffers to add.

    Raises:
        ConfigError: if `world_size` does not fit the layout.
    """
    return [
        _rank_memory(run, world_size, stage, framework)
        for stage in range(run.config.parallel.pipeline)
    ]


def peak_rank(ranks: Sequence[RankMemory]) -> RankMemory:
    """Return the rank that needs most memory."""
    return max(ranks, key=lambda rank: rank.total)


def student_stage_bytes(run: PlannedRun, world_size: int) -> list[tuple[float, float]]:
    """Return the student's bytes of each stage without a teacher's: permanent, and temporary peak.

    Targets are among the permanent ones.
    """
    stages = []
    for stage in range(run.config.parallel.pipeline):
        parameters = _trained_parameters(run, stage)
        permanent = _permanent_bytes(run, world_size, stage, parameters)
        phases = _student_phases(run, world_size, stage, parameters)
        peak = max(sum(phase.values()) for phase in phases.values())
        stages.append((sum(permanent.values()), peak))
    return stages


def separate_teacher_bytes(run: PlannedRun, world_size: int) -> tuple[float, float]:
    """Return the bytes of a teacher in a separate parallel layout: weights, and temporary peak."""
    phases = _teacher_phases(run, world_size, 0)
    peak = max(sum(phase.values()) for phase in phases.values())
    return _teacher_weights(run, world_size, 0), peak


def _rank_memory(run: PlannedRun, world_size: int, stage: int, framework: float) -> RankMemory:
    parameters = _trained_parameters(run, stage)
    permanent = _permanent_bytes(run, world_size, stage, parameters)
    phases = _student_phases(run, world_size, stage, parameters)
    if run.has_live_teacher:
        permanent["communication"] = _pipeline_leftovers(run, world_size, stage)
        permanent["teacher weights"] = _teacher_weights(run, world_size, stage)
        phases |= _teacher_phases(run, world_size, stage)
    moment, peak = max(phases.items(), key=lambda item: sum(item[1].values()))
    parts = {name: permanent.get(name, 0.0) + peak.get(name, 0.0) for name in PARTS}
    parts["framework"] = framework
    kept = _kept_activations(run, world_size, stage)
    return RankMemory(stage, parameters, kept, parts, moment)


def _trained_parameters(run: PlannedRun, stage: int) -> int:
    """Return the weights of the student on a rank, and of the projections of its layers."""
    model, parallel = run.config.model, run.config.parallel
    layout = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "stage": stage}
    parameters = rank_parameters(model, run.vocab_size, **layout)
    if run.teacher is not None:
        projections = projections_of(_hidden_state_pairs(run, stage), model, run.teacher)
        parameters += sum(model.hidden_size * matrix.teacher_width for matrix in projections)
    return parameters


def _hidden_state_pairs(run: PlannedRun, stage: int) -> list[HiddenStatesPair]:
    """Return the pairs of distill.hidden_states whose student layer is on a stage."""
    parallel = run.config.parallel
    layout = {"pipeline": parallel.pipeline, "virtual": parallel.virtual_pipeline}
    return [
        pair
        for pair in run.config.distill.hidden_states
        if stage_of_layer(pair.student_layer, run.config.model.num_layers, **layout) == stage
    ]


def _permanent_bytes(run: PlannedRun, world_size: int, stage: int, parameters: int) -> Parts:
    """Return the memory that exists during the whole step, by part."""
    config, element_bytes = run.config, ELEMENT_BYTES[run.config.train.precision]
    shards = config.data_parallel_size(world_size) if config.optimizer.distributed else 1
    # Adam's two moments in fp32; bf16 weights have fp32 main weights besides.
    state_bytes = 8 if config.train.precision == "fp32" else 12
    step_tokens = config.num_microbatches(world_size) * run.student_shape.tokens
    parts = {
        "weights": element_bytes * parameters,
        "gradients": 4 * parameters,
        "optimizer": state_bytes * parameters / shards,
        # This step's batch, and the next one, which is being read.
        "batches": 2 * _BATCH_TOKEN_BYTES * step_tokens,
        "hidden states": _hidden_state_bytes(run, world_size, stage),
    }
    if config.teacher.enabled and stage == config.parallel.pipeline - 1:
        if config.distill.dense and run.teacher is not None:
            split = config.parallel.tensor if config.parallel.sequence_parallel else 1
            parts["targets"] = step_tokens * element_bytes * run.teacher.hidden_size / split
        else:
            parts["targets"] = step_tokens * (8 * run.target_entries + 8)
    return {name: float(size) for name, size in parts.items()}


def _hidden_state_bytes(run: PlannedRun, world_size: int, stage: int) -> float:
    """Return the bytes that a stage's pairs of distill.hidden_states keep.

    Kept are the teacher's states of the whole step for each teacher layer, and a gradient for each
    student layer and microbatch in flight. Not counted are a second copy of the states while they
    go to another stage, and the fp32 copies of one pair of one microbatch.
    """
    pairs = _hidden_state_pairs(run, stage)
    if run.teacher is None or not pairs:
        return 0.0
    config, shape = run.config, run.student_shape
    microbatches = config.num_microbatches(world_size)
    in_flight = min(config.parallel.pipeline - stage, microbatches)
    teacher_layers = {pair.teacher_layer for pair in pairs}
    student_layers = {pair.student_layer for pair in pairs}
    states = microbatches * len(teacher_layers) * run.teacher.hidden_size
    gradients = in_flight * len(student_layers) * config.model.hidden_size
    tokens = shape.tokens // shape.sequence_split
    return float(tokens * (states + gradients) * shape.element_bytes)


def _chunk_activations(run: PlannedRun) -> float:
    """Return the bytes that one model chunk keeps of one microbatch."""
    config, shape = run.config, run.student_shape
    parallel = config.parallel
    layers = config.model.num_layers // (parallel.pipeline * parallel.virtual_pipeline)
    recompute = config.model.recompute == "full"
    return layers * (shape.layer_input if recompute else shape.layer) + shape.rotary


def _kept_activations(run: PlannedRun, world_size: int, stage: int) -> float:
    """Return the bytes that a stage's layers keep with the most microbatches in flight."""
    parallel = run.config.parallel
    in_flight = microbatches_in_flight(
        parallel.pipeline,
        parallel.virtual_pipeline,
        stage,
        run.config.num_microbatches(world_size),
    )
    final_norm = run.student_shape.final_norm if stage == parallel.pipeline - 1 else 0.0
    return in_flight * _chunk_activations(run) + final_norm


def _student_phases(
    run: PlannedRun, world_size: int, stage: int, parameters: int
) -> dict[str, Parts]:
    """Return the student's temporary memory in each phase that can have the peak."""
    config, shape = run.config, run.student_shape
    parallel = config.parallel
    kept = _kept_activations(run, world_size, stage)
    recomputed_layer = shape.layer - shape.layer_input if config.model.recompute == "full" else 0.0
    phases: dict[str, Parts] = {
        "backward of a layer": {
            "activations": kept + recomputed_layer,
            "temporaries": shape.layer_backward,
        },
        "optimizer": {"temporaries": _optimizer_temporaries(run, world_size, parameters)},
    }
    if stage == parallel.pipeline - 1:
        forward, backward = student_head_bytes(run)
        phases["forward of the head"] = {"activations": kept, "head": forward}
        phases["backward of the head"] = {"activations": kept, "head": backward}
    if stage == 0:
        remaining = kept - _chunk_activations(run) if parallel.virtual_pipeline == 1 else kept
        phases["gradient of the embedding"] = {
            "activations": max(remaining, 0.0),
            "temporaries": float(shape.vocabulary_rows * shape.hidden * shape.element_bytes),
        }
    is_sharded = config.optimizer.distributed and config.data_parallel_size(world_size) > 1
    if run.device == "cpu" and is_sharded:
        # gloo's reduce-scatter is an all-reduce of a copy.
        phases["reduction of the gradients"] = {"communication": 4.0 * parameters}
    for phase in phases.values():
        # megatron-core keeps one buffer for gathered sequences.
        phase["communication"] = phase.get("communication", 0.0) + shape.gathered
    return phases


def _optimizer_temporaries(run: PlannedRun, world_size: int, parameters: int) -> float:
    """Return the bytes of torch's Adam beside its state.

    On a GPU that is one more tensor for all parameters of the rank (foreach), on a CPU two of the
    size of the largest parameter.
    """
    config, shape = run.config, run.student_shape
    shards = config.data_parallel_size(world_size) if config.optimizer.distributed else 1
    if run.device == "cuda":
        return 4.0 * parameters / shards
    largest = max(shape.vocabulary_rows * shape.hidden, 2 * shape.ffn * shape.hidden)
    return 8.0 * min(largest, parameters / shards)


def _teacher_weights(run: PlannedRun, world_size: int, stage: int) -> float:
    """Return the bytes of the teacher's weights beside a stage of the student.

    A teacher in a separate layout counts with its largest stage.
    """
    assert run.teacher is not None
    tensor, pipeline, _ = run.config.teacher_layout(world_size)
    stages = range(pipeline) if run.config.teacher.has_separate_layout else [stage]
    largest = max(
        rank_parameters(
            run.teacher, run.vocab_size, tensor=tensor, pipeline=pipeline, stage=teacher_stage
        )
        for teacher_stage in stages
    )
    return float(ELEMENT_BYTES[run.config.train.precision] * largest)


def _pipeline_leftovers(run: PlannedRun, world_size: int, stage: int) -> float:
    """Return the bytes that pipeline schedules leave on the last stage until their next pass.

    These are the teacher's hidden states and the received inputs.
    """
    pipeline = run.config.parallel.pipeline
    if pipeline == 1 or stage < pipeline - 1 or run.config.teacher.has_separate_layout:
        return 0.0
    return 3 * run.teacher_shape(world_size).layer_input + 2 * run.student_shape.layer_input


def _teacher_phases(run: PlannedRun, world_size: int, stage: int) -> dict[str, Parts]:
    """Return the teacher's temporary memory: a layer, a chunk of the head, targets in transfer."""
    shape, config = run.teacher_shape(world_size), run.config
    _, pipeline, _ = config.teacher_layout(world_size)
    separate = config.teacher.has_separate_layout
    phases: dict[str, Parts] = {"teacher's layers": {"teacher activations": shape.layer_forward}}
    if stage == pipeline - 1 or separate:
        phases["teacher's head"] = {"teacher activations": teacher_head_bytes(run, shape)}
    if separate:
        replica_tokens = (
            config.batch.global_batch_size
            * config.batch.sequence_length
            // config.data_parallel_size(world_size)
        )
        target_bytes = 3.0 * (8 * run.target_entries + 8) * replica_tokens
        phases["exchange of targets"] = {"communication": target_bytes}
    return phases
