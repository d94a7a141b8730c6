"""Seconds of one step, part by part: products, what waits for messages, the pipeline's idle time, the optimizer, the teacher.

    student    FLOPs of a stage / rate, times microbatches (recomputation is one forward more)
    tensor     four sums of [n, H] a layer and microbatch, two forward and two backward (six with recomputation), each 2 (t - 1) / t of
               its bytes over the link; sequence parallelism sends as much in other pieces (arXiv 2205.05198, section 4.2). On a GPU
               those of the backward pass hide behind products of weight gradients
    pipeline   one message each way and microbatch; interleaved, virtual times as many, behind the work
    bubble     with stages of seconds s_i: m max(s_i) + (sum(s_i) - max(s_i)) / virtual less m mean(s_i): (p - 1) / (v m) of the work
               where stages are equal (arXiv 2104.04473, section 2.2), and the waiting for the slowest one
    data       gradients in fp32 once a step, reduce-scattered and weights gathered under optimizer.distributed, which sends as much as
               an all-reduce (arXiv 1910.02054, section 7); overlapped where the run file says so, with one microbatch's work
    optimizer  bytes of Adam and of adding gradients to fp32 sums / bandwidth of the memory
    teacher    its own forward-only pipeline, and choosing targets: passes over its logits / their bandwidth
    exchange   tokens there and targets back, where the teacher has a layout of its own

Data loading, logging, evaluation and checkpoints are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_kd.config import ModelSection
from megatron_kd.planning.flops import flops_per_token
from megatron_kd.planning.hardware import Cluster
from megatron_kd.planning.memory import Job
from megatron_kd.planning.shape import Shape
from megatron_kd.planning.state_memory import rank_parameters

STEP_PARTS = ("student", "tensor", "pipeline", "bubble", "data", "optimizer", "teacher", "exchange")
# Passes over fp32 logits: the loss with its gradient and the health figures; more of them with a target; choosing a target. CPU: measured
# on the operators alone (512 tokens x 8192 ids, top 64, one thread: a pass 1.29 ns a logit, choosing 7.4, the target's part of the loss
# 3.3). GPU: counted in the kernels, not measured.
LOSS_PASSES, TARGET_PASSES, SELECTION_PASSES = (
    {"cuda": 6, "cpu": 3},
    {"cuda": 2, "cpu": 2.6},
    {"cuda": 4, "cpu": 5.7},
)
# Bytes a parameter: Adam reads and writes gradient, weight and two moments; each microbatch adds its gradient to an fp32 sum.
ADAM_BYTES, ACCUMULATE_BYTES = 40, 12


@dataclass(frozen=True)
class Rates:
    """FLOP/s that one rank reaches while it computes, waiting for nobody: products, norms, attention and elementwise parts together."""

    student: float
    teacher: float


@dataclass(frozen=True)
class StepTime:
    """parts: seconds by name (STEP_PARTS). tokens: of the step, all ranks. flops: of the student, without recomputation."""

    parts: dict[str, float]
    tokens: int
    flops: float
    ranks: int

    @property
    def seconds(self) -> float:
        """Of the step."""
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.tokens / self.seconds

    @property
    def achieved(self) -> float:
        """Student FLOP/s of one rank, the teacher's time included and its work not."""
        return self.flops / self.seconds / self.ranks


def step_time(job: Job, cluster: Cluster, rates: Rates) -> StepTime:
    """The step of `job` on all ranks of `cluster`. ConfigError where the layout does not fit them."""
    config = job.config
    parts = dict.fromkeys(STEP_PARTS, 0.0) | student_time(job, cluster, rates.student)
    if job.lives:
        assert job.teacher is not None
        parts["teacher"] = teacher_time(job, cluster, rates.teacher)
        if config.teacher.has_separate_layout:
            parts["exchange"] = _exchange(job, cluster)
    tokens = config.batch.global_batch_size * config.batch.sequence_length
    flops = tokens * flops_per_token(config.model, job.vocab_size, config.batch.sequence_length)
    return StepTime(parts, tokens, flops, cluster.ranks)


def _layers_and_head(
    model: ModelSection, vocab_size: int, sequence_length: int
) -> tuple[float, float]:
    """Forward FLOPs of one token, in all layers and in the head."""
    head = 2.0 * model.hidden_size * vocab_size
    return flops_per_token(model, vocab_size, sequence_length, forward_only=True) - head, head


def student_time(job: Job, cluster: Cluster, rate: float) -> dict[str, float]:
    """Seconds of the student's own parts of a step."""
    config, shape = job.config, job.student
    parallel, microbatches = config.parallel, config.num_microbatches(cluster.ranks)
    data = config.data_parallel_size(cluster.ranks)
    layers, head = _layers_and_head(config.model, job.vocab_size, config.batch.sequence_length)
    recompute = config.model.recompute == "full"
    stages = range(parallel.pipeline)
    last = parallel.pipeline - 1
    layer_work = shape.tokens * layers / parallel.pipeline / shape.tensor / rate
    head_work = (
        shape.tokens
        * head
        / shape.tensor
        / rate
        * (4 if config.distill.head_schedule == "recompute" else 3)
    )
    passes = LOSS_PASSES[job.device] + (TARGET_PASSES[job.device] if config.teacher.enabled else 0)
    rows = passes * 4 * shape.tokens * job.vocab_size / shape.tensor / cluster.row_bandwidth
    work = [
        layer_work * (4 if recompute else 3) + (stage == last) * (head_work + rows)
        for stage in stages
    ]
    tensor = [
        _tensor_time(
            job, cluster, shape, config.model.num_layers // parallel.pipeline, layer_work, recompute
        )
    ] * len(work)
    message = (
        shape.layer_input / cluster.bandwidth(parallel.pipeline, shape.tensor * data)
        + cluster.latency
    )
    messages = 2 * message if parallel.pipeline > 1 else 0.0
    if parallel.virtual_pipeline > 1:
        messages = (
            max(0.0, parallel.virtual_pipeline * messages - work[0])
            if job.device == "cuda"
            else parallel.virtual_pipeline * messages
        )
    whole = [own + sums + messages for own, sums in zip(work, tensor, strict=True)]
    pipeline = microbatches * max(whole) + (sum(whole) - max(whole)) / parallel.virtual_pipeline
    mean = 1 / len(whole)
    parts = {
        "student": microbatches * sum(work) * mean,
        "tensor": microbatches * sum(tensor) * mean,
        "pipeline": microbatches * messages,
        "bubble": pipeline - microbatches * sum(whole) * mean,
    }
    return parts | _update_time(job, cluster, data, max(whole))


def _tensor_time(
    job: Job, cluster: Cluster, shape: Shape, layers: int, layer_work: float, recompute: bool
) -> float:
    """Waiting for sums over the tensor group in one microbatch of one stage."""
    if shape.tensor == 1:
        return 0.0
    one = (
        _ring(
            2 * shape.element * shape.tokens * shape.hidden,
            shape.tensor,
            cluster.bandwidth(shape.tensor, 1),
        )
        + cluster.latency
    )
    forward = (4 if recompute else 2) * layers * one
    backward = 2 * layers * one
    return forward + (max(0.0, backward - layer_work) if job.device == "cuda" else backward)


def _update_time(job: Job, cluster: Cluster, data: int, microbatch: float) -> dict[str, float]:
    """Reduction of gradients, Adam, gathering of weights."""
    config, shape = job.config, job.student
    parallel, microbatches = config.parallel, config.num_microbatches(cluster.ranks)
    parameters = max(
        rank_parameters(
            config.model,
            job.vocab_size,
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            stage=stage,
        )
        for stage in range(parallel.pipeline)
    )
    shards = data if config.optimizer.distributed else 1
    traffic = ADAM_BYTES * parameters / shards + (ACCUMULATE_BYTES * microbatches + 4) * parameters
    parts = {"optimizer": traffic / cluster.memory_bandwidth, "data": 0.0}
    if data == 1:
        return parts
    bandwidth = cluster.bandwidth(data, shape.tensor)
    scatter = _ring(4 * parameters, data, bandwidth) + cluster.latency
    gather = (
        _ring((shape.element if config.optimizer.distributed else 4) * parameters, data, bandwidth)
        + cluster.latency
    )
    if (
        job.device == "cpu"
    ):  # gloo's reduce-scatter is an all-reduce, and nothing overlaps on the cores that compute
        return parts | {"data": 2 * scatter + (gather if config.optimizer.distributed else 0.0)}
    if not config.optimizer.distributed:
        scatter, gather = scatter + gather, 0.0
    if parallel.overlap_grad_reduce:
        scatter = max(0.0, scatter - microbatch * 2 / 3)
    if parallel.overlap_param_gather:
        gather = max(0.0, gather - microbatch / 3)
    return parts | {"data": scatter + gather}


def _ring(size: float, ranks: int, bandwidth: float) -> float:
    """Seconds in which each of `ranks` sends its part of `size` bytes round the ring."""
    return size * (ranks - 1) / ranks / bandwidth


def teacher_time(job: Job, cluster: Cluster, rate: float, *, bare: bool = False) -> float:
    """Seconds of the teacher's forward-only pipeline over a step's tokens, with its targets. bare: its logits, and nothing chosen."""
    assert job.teacher is not None
    tensor, pipeline, micro_batch_size = job.config.teacher_layout(cluster.ranks)
    shape, length = job.teacher_shape(cluster.ranks), job.config.batch.sequence_length
    data = cluster.ranks // (tensor * pipeline)
    microbatches = job.config.batch.global_batch_size // (micro_batch_size * data)
    layers, head = _layers_and_head(job.teacher, job.vocab_size, length)
    work = shape.tokens * layers / pipeline / tensor / rate
    if tensor > 1:
        one = (
            _ring(
                2 * shape.element * shape.tokens * shape.hidden,
                tensor,
                cluster.bandwidth(tensor, 1),
            )
            + cluster.latency
        )
        work += 2 * job.teacher.num_layers / pipeline * one
    if pipeline > 1:
        work += shape.layer_input / cluster.bandwidth(pipeline, tensor * data) + cluster.latency
    passes = 0 if bare else SELECTION_PASSES[job.device]
    rows = passes * 4 * shape.tokens * job.vocab_size / tensor / cluster.row_bandwidth
    last = work + shape.tokens * head / tensor / rate + rows
    return microbatches * last + (pipeline - 1) * work


def _exchange(job: Job, cluster: Cluster) -> float:
    """Two all-to-alls, of what one rank receives: its teacher's samples, and its slice of its targets; and the slices put together."""
    batch, (tensor, pipeline, _) = job.config.batch, job.config.teacher_layout(cluster.ranks)
    bandwidth = cluster.intra if cluster.nodes == 1 else cluster.inter
    samples = batch.global_batch_size * tensor * pipeline / cluster.ranks
    there = 4 * (batch.sequence_length + 4) * samples
    targets = (
        batch.global_batch_size
        / job.config.data_parallel_size(cluster.ranks)
        * batch.sequence_length
        * (8 * job.slots + 8)
    )
    back = targets / job.student.tensor
    together = _ring(targets, job.student.tensor, cluster.bandwidth(job.student.tensor, 1))
    return (there + back) / bandwidth + together + 3 * cluster.latency
