"""Check how the sections of a run file fit together, without world size, files or devices.

Each check yields one sentence per problem. `RELATIONS` lists the checks in the order in which
their problems are reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_kd.config.declarations.schedules import LEARNING_RATE_SCHEDULES
from megatron_kd.config.hidden_state_pairs import pair_problems
from megatron_kd.config.run_sections import RunSections


def relation_problems(config: RunSections) -> list[str]:
    """Return one sentence for each pair of values that do not fit together."""
    return [problem for check in RELATIONS for problem in check(config)]


def _indivisible_sizes(config: RunSections) -> Iterator[str]:
    parallel, batch = config.parallel, config.batch
    axes = {
        "tensor": "parallel.tensor",
        "pipeline": "parallel.pipeline * parallel.virtual_pipeline",
    }
    stages = parallel.pipeline * parallel.virtual_pipeline
    sizes = [
        (f"model.{size.name}", size.size, axes[size.axis], size.ranks)
        for size in config.model.indivisible_sizes(tensor=parallel.tensor, stages=stages)
    ]
    micro_batch_size, length = batch.micro_batch_size, batch.sequence_length
    if batch.global_batch_size % micro_batch_size:
        key = "batch.global_batch_size"
        sizes.append((key, batch.global_batch_size, "batch.micro_batch_size", micro_batch_size))
    if parallel.sequence_parallel and length % parallel.tensor:
        divisor = "parallel.tensor (sequence_parallel)"
        sizes.append(("batch.sequence_length", length, divisor, parallel.tensor))
    for name, size, divisor, value in sizes:
        yield f"{name} ({size}) must be a multiple of {divisor} ({value})"


def _sequence_length(config: RunSections) -> Iterator[str]:
    problem = config.model.window_problem(config.batch.sequence_length)
    if problem is not None:
        yield f"batch.sequence_length {problem}"


def _vocabulary(config: RunSections) -> Iterator[str]:
    if config.model.vocab_size is None and config.data.tokenizer is None:
        yield "set model.vocab_size or data.tokenizer: one of them must give the vocabulary size"


def _top_k(config: RunSections) -> Iterator[str]:
    distill, vocab_size = config.distill, config.model.vocab_size
    has_targets = config.teacher.enabled or config.capture.directory is not None
    uses_top_k = has_targets and distill.num_draws is None and not distill.dense
    if uses_top_k and vocab_size is not None and distill.top_k > vocab_size:
        yield f"distill.top_k ({distill.top_k}) must be at most model.vocab_size ({vocab_size})"


def _dense_targets(config: RunSections) -> Iterator[str]:
    if not config.distill.dense:
        return
    if config.teacher.reads_cache:
        yield (
            "distill.dense compares whole distributions, which a cache does not hold: set "
            'teacher.source = "online"'
        )
    if config.teacher.has_separate_layout:
        yield (
            "distill.dense needs the teacher in the student's layout: unset teacher.parallel and "
            "teacher.micro_batch_size"
        )


def _overlap(config: RunSections) -> Iterator[str]:
    distill = config.distill
    if (distill.dense or distill.hidden_states) and config.teacher.overlap == "drain":
        yield (
            "distill.dense and distill.hidden_states need the teacher right before its student: "
            'set teacher.overlap to "auto" or "none"'
        )


def _learning_rate_schedule(config: RunSections) -> Iterator[str]:
    optimizer, steps = config.optimizer, config.train.steps
    warmup, decay = optimizer.warmup_steps, optimizer.decay_steps
    if warmup > steps:
        yield f"optimizer.warmup_steps ({warmup}) must be at most train.steps ({steps})"
    uses_decay_steps = LEARNING_RATE_SCHEDULES[optimizer.schedule].uses_decay_steps
    if uses_decay_steps and warmup + decay > steps:
        yield (
            f"optimizer.warmup_steps ({warmup}) + optimizer.decay_steps ({decay}) must be at most "
            f"train.steps ({steps})"
        )


def _overlap_param_gather(config: RunSections) -> Iterator[str]:
    parallel = config.parallel
    possible = config.optimizer.distributed and parallel.overlap_grad_reduce
    if parallel.overlap_param_gather and not possible:
        yield (
            "parallel.overlap_param_gather needs optimizer.distributed and "
            "parallel.overlap_grad_reduce"
        )


def _hidden_states(config: RunSections) -> Iterator[str]:
    pairs, teacher = config.distill.hidden_states, config.teacher
    if not pairs:
        return
    yield from pair_problems(pairs, config.model)
    if not teacher.uses_megatron:
        yield (
            "distill.hidden_states compares layers with those of a live teacher of this "
            f'program, not of teacher.source = "{teacher.source}": set teacher.source = "online", '
            "or remove distill.hidden_states"
        )
    if teacher.has_separate_layout:
        yield (
            "distill.hidden_states needs the teacher in the student's layout: unset "
            "teacher.parallel and teacher.micro_batch_size"
        )
    if config.capture.directory is not None:
        yield (
            "capture.directory stores a teacher's targets, not its layers: unset it, or remove "
            "distill.hidden_states"
        )


def _capture(config: RunSections) -> Iterator[str]:
    capture, steps = config.capture, config.train.steps
    if capture.directory is None:
        return
    if config.checkpoint.asynchronous:
        yield (
            "capture.directory shows samples together with a complete checkpoint: set "
            "checkpoint.asynchronous = false"
        )
    if capture.first_step >= steps:
        yield f"capture.first_step ({capture.first_step}) must be less than train.steps ({steps})"
    if config.distill.dense:
        yield (
            "capture.directory stores sparse targets: unset distill.dense, or unset "
            "capture.directory"
        )
    tokens = config.batch.micro_batch_size * config.batch.sequence_length
    mebibytes = -(-tokens * config.target_bytes_per_token >> 20)
    if mebibytes > capture.queue_mib:
        yield (
            f"capture.queue_mib ({capture.queue_mib}) must hold a microbatch's targets: set it to "
            f"{mebibytes} or more"
        )


RELATIONS: tuple[Callable[[RunSections], Iterator[str]], ...] = (
    _indivisible_sizes,
    _sequence_length,
    _vocabulary,
    _top_k,
    _dense_targets,
    _overlap,
    _learning_rate_schedule,
    _overlap_param_gather,
    _hidden_states,
    _capture,
)
