"""Bytes on each rank of a run, part by part, at its fullest moment: student, teacher, head, targets and what moves between ranks.

Weights, gradients and optimizer state are there all the time. Of what comes and goes, the planner forms every moment of a step that can
be the fullest one and takes the largest: forward and backward of the head and of a layer with the most microbatches in flight, the
gradient of the embedding, the reduction of gradients, the optimizer, the teacher's forward and the exchange of targets. What is kept by a
layer was read off autograd's saved tensors (CPU) and follows Korthikanti et al., arXiv 2205.05198, for megatron-core's modules here;
states follow Rajbhandari et al., arXiv 1910.02054 (ZeRO-1).

Shapes: n tokens of a microbatch, H hidden, Q and K widths of queries and keys, F of the MLP, V vocabulary, t tensor-parallel size.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_kd.config import ModelSection, RunConfig
from megatron_kd.head.sizes import (
    BLOCK,
    SAVED_LOGITS_CPU,
    SAVED_LOGITS_CUDA,
    TILE,
    buffer_width,
    chunk_size,
)
from megatron_kd.planning.shape import ELEMENT, Shape, microbatches_in_flight, shape_of
from megatron_kd.planning.state_memory import rank_parameters

SAVED_LOGITS = {"cuda": SAVED_LOGITS_CUDA, "cpu": SAVED_LOGITS_CPU}

PARTS = (
    *("weights", "gradients", "optimizer", "activations", "head", "temporaries", "communication"),
    *("teacher weights", "teacher activations", "targets", "batches", "framework"),
)


@dataclass(frozen=True)
class RankMemory:
    """One rank of a pipeline stage. parts: bytes by name (PARTS) at the fullest moment, which `moment` names."""

    stage: int
    parts: dict[str, float]
    moment: str

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Job:
    """What is planned: a run file's values, the vocabulary's true size, and the shape of its teacher."""

    config: RunConfig
    vocab_size: int
    teacher: ModelSection | None = None
    device: str = "cuda"

    @property
    def student(self) -> Shape:
        """The student in its layout."""
        config = self.config
        sequence_parallel = config.parallel.sequence_parallel
        return self._shape(
            config.model, config.parallel.tensor, sequence_parallel, config.batch.micro_batch_size
        )

    def teacher_shape(self, world_size: int) -> Shape:
        """The teacher in its layout."""
        assert self.teacher is not None
        tensor, _, micro_batch_size = self.config.teacher_layout(world_size)
        split = (
            self.config.parallel.sequence_parallel and not self.config.teacher.has_separate_layout
        )
        return self._shape(self.teacher, tensor, split, micro_batch_size)

    def _shape(
        self, model: ModelSection, tensor: int, sequence_parallel: bool, micro_batch_size: int
    ) -> Shape:
        return shape_of(
            model,
            self.vocab_size,
            tensor=tensor,
            sequence_parallel=sequence_parallel,
            micro_batch_size=micro_batch_size,
            sequence_length=self.config.batch.sequence_length,
            precision=self.config.train.precision,
            device=self.device,
            within_documents=self.config.data.document_attention == "within",
        )

    @property
    def slots(self) -> int:
        """Entries of a sparse target."""
        return self.config.distill.num_draws or self.config.distill.top_k

    @property
    def lives(self) -> bool:
        """Whether the teacher runs beside the student."""
        return self.config.teacher.runs_in_job and self.teacher is not None


def run_memory(job: Job, world_size: int, *, framework: float = 0.0) -> list[RankMemory]:
    """The fullest rank of every pipeline stage of the student. ConfigError where `world_size` does not fit the layout."""
    return [
        _rank_memory(job, world_size, stage, framework)
        for stage in range(job.config.parallel.pipeline)
    ]


def fullest(found: list[RankMemory]) -> RankMemory:
    """The stage that needs most."""
    return max(found, key=lambda rank: rank.total)


def without_teacher(job: Job, world_size: int) -> list[tuple[float, float]]:
    """Of each stage of the student: bytes that are there all the time (targets among them), and of its own fullest moment."""
    found = []
    for stage in range(job.config.parallel.pipeline):
        states, parameters = _states(job, world_size, stage)
        moments = _student_moments(job, world_size, stage, parameters)
        found.append((sum(states.values()), max(sum(each.values()) for each in moments.values())))
    return found


def teacher_alone(job: Job, world_size: int) -> tuple[float, float]:
    """Of a teacher in a layout of its own: bytes of its weights, and of its fullest moment."""
    moments = _teacher_moments(job, world_size, 0)
    return _teacher_weights(job, world_size, 0), max(
        sum(each.values()) for each in moments.values()
    )


def _rank_memory(job: Job, world_size: int, stage: int, framework: float) -> RankMemory:
    states, parameters = _states(job, world_size, stage)
    moments = _student_moments(job, world_size, stage, parameters)
    if job.lives:
        states["communication"] = _left_over(job, world_size, stage)
        states["teacher weights"] = _teacher_weights(job, world_size, stage)
        moments |= _teacher_moments(job, world_size, stage)
    moment, largest = max(moments.items(), key=lambda each: sum(each[1].values()))
    parts = {name: states.get(name, 0.0) + largest.get(name, 0.0) for name in PARTS}
    return RankMemory(stage, {**parts, "framework": framework}, moment)


def _states(job: Job, world_size: int, stage: int) -> tuple[dict[str, float], int]:
    """What is there all the time, and the number of parameters."""
    config, element = job.config, ELEMENT[job.config.train.precision]
    data = config.data_parallel_size(world_size)
    place = {"tensor": config.parallel.tensor, "pipeline": config.parallel.pipeline, "stage": stage}
    parameters = rank_parameters(config.model, job.vocab_size, **place)
    # Adam's two moments; bf16 weights have fp32 main weights beside them.
    moments = 8 if config.train.precision == "fp32" else 12
    step_tokens = config.num_microbatches(world_size) * job.student.tokens
    parts = {
        "weights": element * parameters,
        "gradients": 4 * parameters,
        "optimizer": moments * parameters / (data if config.optimizer.distributed else 1),
        # tokens, labels and positions of 8 bytes and a mask of 4, of this step and of the next one, which is being read
        "batches": 2 * 28 * step_tokens,
    }
    if config.teacher.enabled and stage == config.parallel.pipeline - 1:
        if config.distill.dense and job.teacher is not None:
            split = config.parallel.tensor if config.parallel.sequence_parallel else 1
            parts["targets"] = step_tokens * element * job.teacher.hidden_size / split
        else:
            parts["targets"] = step_tokens * (8 * job.slots + 8)
    return {name: float(size) for name, size in parts.items()}, parameters


def _student_moments(
    job: Job, world_size: int, stage: int, parameters: int
) -> dict[str, dict[str, float]]:
    """What comes and goes on the student's side, at each moment that can be the fullest."""
    config, shape = job.config, job.student
    parallel, recompute = config.parallel, config.model.recompute == "full"
    last, first = stage == parallel.pipeline - 1, stage == 0
    in_flight = microbatches_in_flight(
        parallel.pipeline, parallel.virtual_pipeline, stage, config.num_microbatches(world_size)
    )
    layers = config.model.num_layers // (parallel.pipeline * parallel.virtual_pipeline)
    chunk = layers * (shape.layer_input if recompute else shape.layer) + shape.rotary
    kept = in_flight * chunk + (shape.final_norm if last else 0.0)
    gathered = shape.gathered  # megatron-core keeps one buffer for sequences put together
    backward = kept + (shape.layer - shape.layer_input if recompute else 0.0)
    moments = {
        "backward of a layer": {
            "activations": backward,
            "temporaries": shape.layer_backward,
            "communication": gathered,
        },
        "optimizer": {
            "temporaries": _optimizer_temporaries(job, world_size, parameters),
            "communication": gathered,
        },
    }
    if last:
        forward_peak, backward_peak = _head(job)
        moments["forward of the head"] = {
            "activations": kept,
            "head": forward_peak,
            "communication": gathered,
        }
        moments["backward of the head"] = {
            "activations": kept,
            "head": backward_peak,
            "communication": gathered,
        }
    if first:
        rest = kept - chunk if parallel.virtual_pipeline == 1 else kept
        table = shape.vocabulary_rows * shape.hidden * shape.element
        moments["gradient of the embedding"] = {
            "activations": max(rest, 0.0),
            "temporaries": table,
            "communication": gathered,
        }
    if (
        job.device == "cpu"
        and config.optimizer.distributed
        and config.data_parallel_size(world_size) > 1
    ):
        # gloo's reduce-scatter is an all-reduce of a copy.
        moments["reduction of the gradients"] = {"communication": 4.0 * parameters + gathered}
    return moments


def _optimizer_temporaries(job: Job, world_size: int, parameters: int) -> float:
    """torch's Adam: on a GPU one more tensor for all parameters of this rank (foreach), on a CPU two of the largest one's size."""
    config = job.config
    data = config.data_parallel_size(world_size) if config.optimizer.distributed else 1
    if job.device == "cuda":
        return 4.0 * parameters / data
    shape = job.student
    largest = max(shape.vocabulary_rows * shape.hidden, 2 * shape.ffn * shape.hidden)
    return 8.0 * min(largest, parameters / data)


def _head(job: Job) -> tuple[float, float]:
    """Bytes of the output head in its forward and backward, beside the activations: see losses/head.py and head/chunked_head.py."""
    shape, distill = job.student, job.config.distill
    tokens, rows = shape.tokens, shape.vocabulary_rows
    width = buffer_width(min(rows, job.vocab_size))
    chunk = chunk_tokens(job, shape)
    share = -(-job.vocab_size // shape.tensor)
    schedule = distill.head_schedule
    if schedule == "auto" and tokens * share <= SAVED_LOGITS[job.device]:
        schedule = "save"
    weight_gradient, dummy = 4.0 * rows * shape.hidden, float(shape.element * rows * shape.hidden)
    hidden_gradient = (
        4.0 * tokens * shape.hidden / shape.sequence_split + 4.0 * chunk * shape.hidden
    )
    # What a token's loss holds: ids, log-probabilities, probabilities and statistics of each entry.
    small = tokens * (40.0 * job.slots + 64.0) if job.config.teacher.enabled else 64.0 * tokens
    blocks = 8.0 * width * max(1, min(chunk, BLOCK // width)) if job.device == "cpu" else 0.0
    # A CPU multiplies fp32 by fp32: bf16 weights are widened once.
    widened = weight_gradient if job.device == "cpu" and shape.element == 2 else 0.0
    buffers = 4.0 * chunk * width * (3 if distill.dense else 1) + blocks + widened + small
    if schedule == "save":
        saved = 4.0 * tokens * width
        return buffers + saved - 4.0 * chunk * width, max(
            saved + blocks + widened, dummy
        ) + hidden_gradient + small
    if schedule == "direct":
        return buffers + hidden_gradient, dummy + hidden_gradient
    if schedule == "recompute":
        return buffers, buffers + 8.0 * tokens * shape.hidden + dummy
    return (
        buffers + hidden_gradient + weight_gradient,
        weight_gradient + dummy + hidden_gradient + small,
    )


def chunk_tokens(job: Job, shape: Shape) -> int:
    """Return the tokens whose logits exist at one time."""
    share = -(-job.vocab_size // shape.tensor)
    return chunk_size(
        job.config.distill.chunk_tokens, share, shape.tokens, on_cuda=job.device == "cuda"
    )


def _teacher_weights(job: Job, world_size: int, stage: int) -> float:
    """Of the fullest stage of the teacher, where it has a layout of its own."""
    assert job.teacher is not None
    tensor, pipeline, _ = job.config.teacher_layout(world_size)
    stages = range(pipeline) if job.config.teacher.has_separate_layout else [stage]
    most = max(
        rank_parameters(job.teacher, job.vocab_size, tensor=tensor, pipeline=pipeline, stage=each)
        for each in stages
    )
    return float(ELEMENT[job.config.train.precision] * most)


def _left_over(job: Job, world_size: int, stage: int) -> float:
    """What the schedules of a pipeline leave on the last stage until their next pass: the teacher's hidden states and what came in."""
    pipeline = job.config.parallel.pipeline
    if pipeline == 1 or stage < pipeline - 1 or job.config.teacher.has_separate_layout:
        return 0.0
    return 3 * job.teacher_shape(world_size).layer_input + 2 * job.student.layer_input


def _teacher_moments(job: Job, world_size: int, stage: int) -> dict[str, dict[str, float]]:
    """The teacher's forward: one layer, then one chunk of logits and what is chosen from it; and targets on their way."""
    shape, config = job.teacher_shape(world_size), job.config
    _, pipeline, _ = config.teacher_layout(world_size)
    own = config.teacher.has_separate_layout
    moments = {"teacher's layers": {"teacher activations": shape.layer_forward}}
    if stage == pipeline - 1 or own:
        width, chunk = (
            buffer_width(min(shape.vocabulary_rows, job.vocab_size)),
            chunk_tokens(job, shape),
        )
        tiles = min(job.slots * TILE, width)
        scratch = (
            8.0 * width * max(1, min(chunk, BLOCK // width)) + 5.0 * chunk * tiles
            if job.device == "cpu"
            else 0.0
        )
        widened = (
            4.0 * shape.vocabulary_rows * shape.hidden
            if job.device == "cpu" and shape.element == 2
            else 0.0
        )
        head = (
            4.0 * chunk * width
            + scratch
            + widened
            + 2 * shape.element * shape.tokens * shape.hidden
        )
        moments["teacher's head"] = {"teacher activations": head}
    if own:
        replica = (
            config.batch.global_batch_size
            * config.batch.sequence_length
            // config.data_parallel_size(world_size)
        )
        moments["exchange of targets"] = {"communication": 3.0 * (8 * job.slots + 8) * replica}
    return moments
