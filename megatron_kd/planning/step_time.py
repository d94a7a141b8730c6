"""Estimate the seconds of one step, part by part.

    student    FLOPs of a stage / rate, times microbatches (recomputation is one more forward)
    tensor     four sums of [n, H] per layer and microbatch, two forward and two backward (six with
               recomputation), each 2 (t - 1) / t of its bytes over the link; sequence parallelism
               sends as much in other pieces (arXiv 2205.05198, section 4.2). On a GPU those of the
               backward pass hide behind the products of weight gradients
    pipeline   one message per direction and microbatch; interleaved, `virtual` times as many,
               behind the work
    bubble     with stages of seconds s_i: m max(s_i) + (sum(s_i) - max(s_i)) / virtual less
               m mean(s_i). That is (p - 1) / (v m) of the work where stages are equal (arXiv
               2104.04473, section 2.2), and the waiting for the slowest one
    data       gradients in fp32 once per step, reduce-scattered and weights gathered under
               optimizer.distributed, which sends as much as an all-reduce (arXiv 1910.02054,
               section 7); overlapped with one microbatch's work where the run file says so
    optimizer  bytes of Adam and of adding gradients to fp32 sums / bandwidth of the memory
    teacher    its forward-only pipeline, and target selection: passes over its logits / their
               bandwidth
    exchange   tokens to a teacher in a separate parallel layout, and targets back

Data loading, logging, evaluation and checkpoints are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_kd.config import ModelSection
from megatron_kd.planning.flops import flops_per_token
from megatron_kd.planning.hardware import Cluster
from megatron_kd.planning.parameters import rank_parameters
from megatron_kd.planning.planned_run import PlannedRun
from megatron_kd.planning.shape import RankShape

STEP_PARTS = ("student", "tensor", "pipeline", "bubble", "data", "optimizer", "teacher", "exchange")
# Passes over fp32 logits by device. CPU: measured on the operators alone (512 tokens x 8192 ids,
# top 64, one thread: a pass takes 1.29 ns per logit, selection 7.4, the target's part of the loss
# 3.3). GPU: counted in the kernels, not measured.
LOSS_PASSES = {"cuda": 6, "cpu": 3}  # the loss with its gradient and the per-token metrics
TARGET_PASSES = {"cuda": 2, "cpu": 2.6}  # additional ones with a target
SELECTION_PASSES = {"cuda": 4, "cpu": 5.7}  # selection of a target
# Bytes per parameter: Adam reads and writes gradient, weight and two moments.
ADAM_BYTES = 40
# Bytes per parameter and microbatch: a gradient is added to an fp32 sum.
ACCUMULATE_BYTES = 12


@dataclass(frozen=True)
class ComputeRates:
    """Hold the FLOP/s that one rank reaches while it computes and waits for no other rank.

    Products, norms, attention and elementwise parts count together.
    """

    student: float
    teacher: float


@dataclass(frozen=True)
class StepTime:
    """Hold the estimated time of one step.

    Attributes:
        parts: seconds by name (STEP_PARTS).
        tokens: tokens of the step, over all ranks.
        flops: model FLOPs of the student, without recomputation.
        ranks: number of ranks.
    """

    parts: dict[str, float]
    tokens: int
    flops: float
    ranks: int

    @property
    def seconds(self) -> float:
        """Return the seconds of the step."""
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Return the rate over all ranks."""
        return self.tokens / self.seconds

    @property
    def achieved(self) -> float:
        """Return the student's FLOP/s of one rank; the teacher's time counts, its work does not."""
        return self.flops / self.seconds / self.ranks


def step_time(run: PlannedRun, cluster: Cluster, rates: ComputeRates) -> StepTime:
    """Return the time of one step of `run` on all ranks of `cluster`.

    Raises:
        ConfigError: if the layout does not fit the number of ranks.
    """
    config = run.config
    parts = dict.fromkeys(STEP_PARTS, 0.0) | student_time(run, cluster, rates.student)
    if run.has_live_teacher:
        parts["teacher"] = teacher_time(run, cluster, rates.teacher)
        if config.teacher.has_separate_layout:
            parts["exchange"] = _exchange_time(run, cluster)
    tokens = config.batch.global_batch_size * config.batch.sequence_length
    flops = tokens * flops_per_token(config.model, run.vocab_size, config.batch.sequence_length)
    return StepTime(parts, tokens, flops, cluster.ranks)


def _forward_flops(
    model: ModelSection, vocab_size: int, sequence_length: int
) -> tuple[float, float]:
    """Return the forward FLOPs of one token in all layers, and in the head."""
    head = 2.0 * model.hidden_size * vocab_size
    return flops_per_token(model, vocab_size, sequence_length, forward_only=True) - head, head


def student_time(run: PlannedRun, cluster: Cluster, rate: float) -> dict[str, float]:
    """Return the seconds of the student's parts of a step.

    Args:
        run: the run.
        cluster: the ranks and their links.
        rate: FLOP/s of one rank while it computes.
    """
    parallel = run.config.parallel
    microbatches = run.config.num_microbatches(cluster.ranks)
    work = _stage_work(run, cluster, rate)
    tensor = [_tensor_time(run, cluster, rate)] * len(work)
    messages = _message_time(run, cluster, work[0])
    stages = [seconds + sums + messages for seconds, sums in zip(work, tensor, strict=True)]
    slowest = max(stages)
    pipeline = microbatches * slowest + (sum(stages) - slowest) / parallel.virtual_pipeline
    mean = 1 / len(stages)
    parts = {
        "student": microbatches * sum(work) * mean,
        "tensor": microbatches * sum(tensor) * mean,
        "pipeline": microbatches * messages,
        "bubble": pipeline - microbatches * sum(stages) * mean,
    }
    return parts | _update_time(run, cluster, slowest)


def _layer_work(run: PlannedRun, rate: float) -> float:
    """Return the seconds of one microbatch's forward pass in the layers of one stage."""
    config, shape = run.config, run.student_shape
    layers, _ = _forward_flops(config.model, run.vocab_size, config.batch.sequence_length)
    return shape.tokens * layers / config.parallel.pipeline / shape.tensor / rate


def _stage_work(run: PlannedRun, cluster: Cluster, rate: float) -> list[float]:
    """Return the seconds in which each stage computes one microbatch, forward and backward."""
    config, shape = run.config, run.student_shape
    _, head = _forward_flops(config.model, run.vocab_size, config.batch.sequence_length)
    head_passes = 4 if config.distill.head_schedule == "recompute" else 3
    head_work = shape.tokens * head / shape.tensor / rate * head_passes
    target_passes = TARGET_PASSES[run.device] if config.teacher.enabled else 0
    passes = LOSS_PASSES[run.device] + target_passes
    loss_work = passes * 4 * shape.tokens * run.vocab_size / shape.tensor / cluster.row_bandwidth
    layer_passes = 4 if config.model.recompute == "full" else 3
    layer_work, last = _layer_work(run, rate), config.parallel.pipeline - 1
    return [
        layer_work * layer_passes + (stage == last) * (head_work + loss_work)
        for stage in range(config.parallel.pipeline)
    ]


def _message_time(run: PlannedRun, cluster: Cluster, work: float) -> float:
    """Return the seconds of one microbatch's messages between stages that `work` does not hide."""
    parallel, shape = run.config.parallel, run.student_shape
    if parallel.pipeline == 1:
        return 0.0
    stride = shape.tensor * run.config.data_parallel_size(cluster.ranks)
    bandwidth = cluster.bandwidth(parallel.pipeline, stride)
    messages = 2 * (shape.layer_input / bandwidth + cluster.latency)
    if parallel.virtual_pipeline == 1:
        return messages
    if run.device == "cuda":
        return max(0.0, parallel.virtual_pipeline * messages - work)
    return parallel.virtual_pipeline * messages


def _tensor_time(run: PlannedRun, cluster: Cluster, rate: float) -> float:
    """Return the seconds of waiting for sums over the tensor group, per stage and microbatch."""
    config, shape = run.config, run.student_shape
    if shape.tensor == 1:
        return 0.0
    layers = config.model.num_layers // config.parallel.pipeline
    one_sum = _sum_time(shape, shape.tensor, cluster)
    forward = (4 if config.model.recompute == "full" else 2) * layers * one_sum
    backward = 2 * layers * one_sum
    if run.device == "cuda":
        backward = max(0.0, backward - _layer_work(run, rate))
    return forward + backward


def _sum_time(shape: RankShape, tensor: int, cluster: Cluster) -> float:
    """Return the seconds of one sum of [n, H] over the tensor group."""
    size = 2 * shape.element_bytes * shape.tokens * shape.hidden
    return _ring_time(size, tensor, cluster.bandwidth(tensor, 1)) + cluster.latency


def _update_time(run: PlannedRun, cluster: Cluster, microbatch: float) -> dict[str, float]:
    """Return the seconds of reducing gradients, of Adam, and of gathering weights.

    Args:
        run: the run.
        cluster: the ranks and their links.
        microbatch: seconds of one microbatch, behind which overlapped communication hides.
    """
    config, shape = run.config, run.student_shape
    parallel, distributed = config.parallel, config.optimizer.distributed
    data = config.data_parallel_size(cluster.ranks)
    parameters = _largest_stage(run)
    adam = ADAM_BYTES * parameters / (data if distributed else 1)
    accumulate = ACCUMULATE_BYTES * config.num_microbatches(cluster.ranks) + 4
    traffic = adam + accumulate * parameters
    parts = {"optimizer": traffic / cluster.memory_bandwidth, "data": 0.0}
    if data == 1:
        return parts
    bandwidth = cluster.bandwidth(data, shape.tensor)
    gathered_bytes = (shape.element_bytes if distributed else 4) * parameters
    scatter = _ring_time(4 * parameters, data, bandwidth) + cluster.latency
    gather = _ring_time(gathered_bytes, data, bandwidth) + cluster.latency
    if run.device == "cpu":
        # gloo's reduce-scatter is an all-reduce, and nothing overlaps on the cores that compute.
        return parts | {"data": 2 * scatter + (gather if distributed else 0.0)}
    if not distributed:
        scatter, gather = scatter + gather, 0.0
    if parallel.overlap_grad_reduce:
        scatter = max(0.0, scatter - microbatch * 2 / 3)
    if parallel.overlap_param_gather:
        gather = max(0.0, gather - microbatch / 3)
    return parts | {"data": scatter + gather}


def _largest_stage(run: PlannedRun) -> int:
    """Return the student's parameters on a rank of its largest stage."""
    parallel = run.config.parallel
    layout = {"tensor": parallel.tensor, "pipeline": parallel.pipeline}
    return max(
        rank_parameters(run.config.model, run.vocab_size, stage=stage, **layout)
        for stage in range(parallel.pipeline)
    )


def _ring_time(size: float, ranks: int, bandwidth: float) -> float:
    """Return the seconds in which each of `ranks` sends its part of `size` bytes round a ring."""
    return size * (ranks - 1) / ranks / bandwidth


def teacher_time(
    run: PlannedRun, cluster: Cluster, rate: float, *, forward_only: bool = False
) -> float:
    """Return the seconds of the teacher's pipeline over a step's tokens.

    Args:
        run: a run with a teacher of known shape.
        cluster: the ranks and their links.
        rate: FLOP/s of one rank while it computes.
        forward_only: stop at the logits and select no targets.
    """
    assert run.teacher is not None
    tensor, pipeline, micro_batch_size = run.config.teacher_layout(cluster.ranks)
    shape, length = run.teacher_shape(cluster.ranks), run.config.batch.sequence_length
    data = cluster.ranks // (tensor * pipeline)
    microbatches = run.config.batch.global_batch_size // (micro_batch_size * data)
    layers, head = _forward_flops(run.teacher, run.vocab_size, length)
    work = shape.tokens * layers / pipeline / tensor / rate
    if tensor > 1:
        work += 2 * run.teacher.num_layers / pipeline * _sum_time(shape, tensor, cluster)
    if pipeline > 1:
        bandwidth = cluster.bandwidth(pipeline, tensor * data)
        work += shape.layer_input / bandwidth + cluster.latency
    passes = 0 if forward_only else SELECTION_PASSES[run.device]
    selection = passes * 4 * shape.tokens * run.vocab_size / tensor / cluster.row_bandwidth
    last_stage = work + shape.tokens * head / tensor / rate + selection
    return microbatches * last_stage + (pipeline - 1) * work


def _exchange_time(run: PlannedRun, cluster: Cluster) -> float:
    """Return the seconds of the two all-to-alls with a teacher in a separate parallel layout.

    A rank receives its teacher's samples, then its slice of its targets, which is gathered over
    the tensor group.
    """
    config, batch = run.config, run.config.batch
    tensor, pipeline, _ = config.teacher_layout(cluster.ranks)
    student_tensor = run.student_shape.tensor
    bandwidth = cluster.intra if cluster.nodes == 1 else cluster.inter
    samples = batch.global_batch_size * tensor * pipeline / cluster.ranks
    sample_bytes = 4 * (batch.sequence_length + 4) * samples
    replica_samples = batch.global_batch_size / config.data_parallel_size(cluster.ranks)
    target_bytes = replica_samples * batch.sequence_length * (8 * run.target_entries + 8)
    transfer = (sample_bytes + target_bytes / student_tensor) / bandwidth
    gather = _ring_time(target_bytes, student_tensor, cluster.bandwidth(student_tensor, 1))
    return transfer + gather + 3 * cluster.latency
