"""Every layout of student and teacher over a cluster, those that fit in its memory, the fastest first.

A layout is a RunConfig: what the program would refuse is refused here by the same checks. Student and teacher share memory and take
turns in time, so each student's layout gets the fastest teacher's layout that still fits beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

from pydantic import ValidationError

from megatron_kd.config import ConfigError, ParallelSection, RunConfig
from megatron_kd.config.sections import TeacherParallelSection
from megatron_kd.planning.hardware import GIB, Cluster
from megatron_kd.planning.memory import (
    Job,
    RankMemory,
    fullest,
    run_memory,
    teacher_alone,
    without_teacher,
)
from megatron_kd.planning.step_time import Rates, StepTime, step_time, student_time, teacher_time

MICRO_BATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Plan:
    """One layout: what it needs on each stage's ranks, and how long a step takes."""

    job: Job
    memory: list[RankMemory]
    time: StepTime

    @property
    def fullest(self) -> RankMemory:
        """The stage that needs most."""
        return fullest(self.memory)

    @property
    def overrides(self) -> list[str]:
        """Words to put behind the command of the run."""
        config = self.job.config
        values: dict[str, object] = {
            "parallel.tensor": config.parallel.tensor,
            "parallel.pipeline": config.parallel.pipeline,
            "parallel.virtual_pipeline": config.parallel.virtual_pipeline,
            "parallel.sequence_parallel": config.parallel.sequence_parallel,
            "parallel.overlap_grad_reduce": config.parallel.overlap_grad_reduce,
            "parallel.overlap_param_gather": config.parallel.overlap_param_gather,
            "batch.global_batch_size": config.batch.global_batch_size,
            "batch.micro_batch_size": config.batch.micro_batch_size,
            "model.recompute": config.model.recompute,
            "optimizer.distributed": config.optimizer.distributed,
        }
        if self.job.lives:  # null: as the student, whatever the run file says
            values |= {
                "teacher.parallel.tensor": config.teacher.parallel.tensor,
                "teacher.parallel.pipeline": config.teacher.parallel.pipeline,
                "teacher.micro_batch_size": config.teacher.micro_batch_size,
            }
        return [
            word
            for key, value in values.items()
            for word in (f"--{key}", "null" if value is None else str(value).lower())
        ]


@dataclass(frozen=True)
class Found:
    """plans: the fastest first. considered: layouts that the program would run. least: the one that needs least memory."""

    plans: list[Plan]
    considered: int
    least: Plan | None


def evaluate(job: Job, cluster: Cluster, rates: Rates) -> Plan:
    """One layout as it stands. ConfigError where the program would refuse it."""
    if job.lives:
        assert job.teacher is not None
        problem = job.config.teacher_problem(job.teacher, cluster.ranks)
        if problem is not None:
            raise ConfigError(f"the teacher has {problem}")
    time = step_time(job, cluster, rates)
    return Plan(job, run_memory(job, cluster.ranks, framework=cluster.framework), time)


def search(job: Job, cluster: Cluster, rates: Rates, *, keep: int = 40) -> Found:
    """The `keep` fastest layouts of `job` on `cluster`. ConfigError, one sentence, where none fits or none is possible."""
    if job.config.teacher.runs_in_job and not job.config.teacher.uses_megatron:
        raise ConfigError(
            f'teacher.source = "{job.config.teacher.source}" is not planned: convert the teacher (tools/convert_checkpoint.py) and use "online"'
        )
    options = list(_students(job, cluster))
    if not options:
        raise ConfigError(
            f"no layout of {cluster.ranks} ranks divides this model and batch.global_batch_size = "
            f"{job.config.batch.global_batch_size}: change the number of ranks or the batch"
        )
    teachers = (
        sorted(_teachers(job, cluster, rates), key=lambda each: each.seconds) if job.lives else []
    )
    plans: list[tuple[float, Job]] = []
    least: tuple[float, Job] | None = None
    for option in options:
        choices = list(_choices(option, job, teachers, cluster, rates))
        smallest = min(choices, key=lambda each: each.need, default=None)
        if smallest is not None and (least is None or smallest.need < least[0]):
            least = smallest.need, _complete(option, job, smallest.teacher)
        fitting = [each for each in choices if each.need <= cluster.memory]
        if fitting:
            # The first of equals: the teacher in the student's layout, which needs no exchange.
            best_choice = min(fitting, key=lambda each: each.seconds)
            seconds = (
                sum(student_time(option, cluster, rates.student).values()) + best_choice.seconds
            )
            plans.append((seconds, _complete(option, job, best_choice.teacher)))
    if not plans:
        _nothing_fits(least, cluster)
    best: list[Plan] = []
    for _, chosen in sorted(plans, key=lambda each: each[0]):
        plan = evaluate(chosen, cluster, rates)
        best += [plan] if plan.fullest.total <= cluster.memory else []
        if len(best) == keep:
            break
    assert least is not None
    return Found(
        sorted(best, key=lambda plan: plan.time.seconds),
        len(options) * max(1, len(teachers)),
        evaluate(least[1], cluster, rates),
    )


def _nothing_fits(least: tuple[float, Job] | None, cluster: Cluster) -> None:
    if least is None:
        raise ConfigError(
            "no layout of the teacher divides it and batch.global_batch_size: change the number of ranks or the batch"
        )
    config = least[1].config
    layout = f"tensor {config.parallel.tensor} x pipeline {config.parallel.pipeline}"
    layout += ", model.recompute = full" if config.model.recompute == "full" else ""
    raise ConfigError(
        f"nothing fits: the layout that needs least ({layout}) takes {least[0] / GIB:.1f} GiB a rank of {cluster.memory / GIB:.1f}: take "
        "GPUs with more memory, more of them, shorter sequences, a smaller model, or a cached teacher"
    )


def _students(job: Job, cluster: Cluster) -> Iterator[Job]:
    """Layouts of the student that the program accepts; the teacher of each is still to be chosen."""
    config, ranks = job.config, cluster.ranks
    cuda = job.device == "cuda"
    for tensor, pipeline in product(_divisors(min(cluster.gpus_per_node, ranks)), _divisors(ranks)):
        if ranks % (tensor * pipeline) or config.model.num_layers % pipeline:
            continue
        data = ranks // (tensor * pipeline)
        virtuals = [
            each
            for each in _divisors(config.model.num_layers // pipeline)
            if each == 1 or pipeline > 1
        ]
        sequence, sharded = (
            ([False, True] if tensor > 1 else [False]),
            ([False, True] if data > 1 else [False]),
        )
        for virtual, split, size, recompute, distributed in product(
            virtuals, sequence, MICRO_BATCHES, ("none", "full"), sharded
        ):
            parallel = {
                "tensor": tensor,
                "pipeline": pipeline,
                "virtual_pipeline": virtual,
                "sequence_parallel": split,
                "overlap_grad_reduce": cuda and data > 1,
                "overlap_param_gather": cuda and distributed,
            }
            found = _checked(config, parallel, size, recompute, distributed)
            if found is not None and _divides(found, ranks):
                yield replace(job, config=found, teacher=None)


def _checked(
    config: RunConfig, parallel: Mapping[str, object], size: int, recompute: str, distributed: bool
) -> RunConfig | None:
    """The run file with this layout; None where its own checks refuse it."""
    own = config.teacher.model_copy(
        update={"parallel": TeacherParallelSection(), "micro_batch_size": None}
    )
    sections = {name: getattr(config, name) for name in RunConfig.model_fields}
    sections |= {
        "teacher": own,
        "model": config.model.model_copy(update={"recompute": recompute}),
        "optimizer": config.optimizer.model_copy(update={"distributed": distributed}),
        "batch": config.batch.model_copy(update={"micro_batch_size": size}),
    }
    try:
        return RunConfig.model_validate(
            {**sections, "parallel": ParallelSection.model_validate(parallel)}
        )
    except ValidationError:
        return None


def _divides(config: RunConfig, ranks: int) -> bool:
    try:
        config.data_parallel_size(ranks)
    except ConfigError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


@dataclass(frozen=True)
class _Teacher:
    """One layout of the teacher's own, and what it takes wherever the student is."""

    tensor: int
    pipeline: int
    micro_batch_size: int
    seconds: float
    weights: float
    moment: float


def _teachers(job: Job, cluster: Cluster, rates: Rates) -> Iterator[_Teacher]:
    """Layouts of the teacher over the same ranks that the program accepts."""
    if job.config.distill.dense or not job.config.teacher.uses_megatron:
        return
    assert job.teacher is not None
    base = _checked(job.config, {}, 1, "none", False)
    for tensor, pipeline, size in product(
        _divisors(min(cluster.gpus_per_node, cluster.ranks)),
        _divisors(min(16, cluster.ranks)),
        MICRO_BATCHES,
    ):
        if base is None or cluster.ranks % (tensor * pipeline):
            continue
        found = replace(job, config=_with_teacher(base, tensor, pipeline, size))
        try:
            if found.config.teacher_problem(job.teacher, cluster.ranks) is not None:
                continue
        except ConfigError:
            continue
        weights, moment = teacher_alone(found, cluster.ranks)
        yield _Teacher(
            tensor, pipeline, size, teacher_time(found, cluster, rates.teacher), weights, moment
        )


def _with_teacher(config: RunConfig, tensor: int, pipeline: int, size: int) -> RunConfig:
    section = config.teacher.model_copy(
        update={
            "parallel": TeacherParallelSection(tensor=tensor, pipeline=pipeline),
            "micro_batch_size": size,
        }
    )
    return config.model_copy(update={"teacher": section})


@dataclass(frozen=True)
class _Choice:
    """What a student's layout takes with one of the teacher's. need: bytes of the fullest rank. seconds: the teacher's."""

    need: float
    seconds: float
    teacher: _Teacher | None


def _choices(
    option: Job, job: Job, teachers: list[_Teacher], cluster: Cluster, rates: Rates
) -> Iterator[_Choice]:
    """The student with no live teacher; or with the teacher in its layout, and in each layout of the teacher's own."""
    if not job.lives:
        yield _Choice(
            cluster.framework + max(map(sum, without_teacher(option, cluster.ranks))), 0.0, None
        )
        return
    assert job.teacher is not None
    if option.config.teacher_problem(job.teacher, cluster.ranks) is None:
        both = replace(option, teacher=job.teacher)
        need = fullest(run_memory(both, cluster.ranks, framework=cluster.framework)).total
        yield _Choice(need, teacher_time(both, cluster, rates.teacher), None)
    stages = without_teacher(option, cluster.ranks) if teachers else []
    for each in teachers:
        need = cluster.framework + max(
            states + each.weights + max(moment, each.moment) for states, moment in stages
        )
        yield _Choice(need, each.seconds, each)


def _complete(option: Job, job: Job, teacher: _Teacher | None) -> Job:
    """The student's layout with the teacher chosen for it."""
    config = option.config
    if teacher is not None:
        config = _with_teacher(config, teacher.tensor, teacher.pipeline, teacher.micro_batch_size)
    return replace(option, config=config, teacher=job.teacher)
