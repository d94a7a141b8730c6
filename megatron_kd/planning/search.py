"""Search the layouts of student and teacher that fit a cluster, fastest first.

A layout is a RunConfig: layouts that the program would refuse are refused here by the same checks.
Student and teacher share memory and take turns in time, so each layout of the student gets the
fastest layout of the teacher that still fits beside it.
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
    RankMemory,
    peak_rank,
    run_memory,
    separate_teacher_bytes,
    student_stage_bytes,
)
from megatron_kd.planning.planned_run import PlannedRun
from megatron_kd.planning.step_time import (
    ComputeRates,
    StepTime,
    step_time,
    student_time,
    teacher_time,
)

MICRO_BATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class LayoutPlan:
    """Hold one layout, the memory of each stage's ranks, and the time of a step."""

    run: PlannedRun
    memory: list[RankMemory]
    time: StepTime

    @property
    def peak(self) -> RankMemory:
        """Return the stage that needs most memory."""
        return peak_rank(self.memory)

    @property
    def overrides(self) -> list[str]:
        """Return the command-line words that set this layout in a run."""
        config = self.run.config
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
        if self.run.has_live_teacher:  # null: the student's, whatever the run file sets
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
class SearchResult:
    """Hold the layouts of a search.

    Attributes:
        plans: the fastest first.
        considered: number of layouts that the program would run.
        smallest: the layout that needs least memory.
    """

    plans: list[LayoutPlan]
    considered: int
    smallest: LayoutPlan | None


def evaluate(run: PlannedRun, cluster: Cluster, rates: ComputeRates) -> LayoutPlan:
    """Return the plan of one layout as it is.

    Raises:
        ConfigError: if the program would refuse it.
    """
    if run.has_live_teacher:
        assert run.teacher is not None
        problem = run.config.teacher_problem(run.teacher, cluster.ranks)
        if problem is not None:
            raise ConfigError(f"the teacher has {problem}")
    time = step_time(run, cluster, rates)
    return LayoutPlan(run, run_memory(run, cluster.ranks, framework=cluster.framework), time)


def search(
    run: PlannedRun, cluster: Cluster, rates: ComputeRates, *, keep: int = 40
) -> SearchResult:
    """Return the fastest layouts of a run on a cluster.

    Args:
        run: the run; its layout is ignored.
        cluster: the ranks, their memory and links.
        rates: FLOP/s of a rank.
        keep: number of layouts to return.

    Raises:
        ConfigError: if no layout is possible, or none fits in memory.
    """
    if run.config.teacher.runs_in_job and not run.config.teacher.uses_megatron:
        raise ConfigError(
            f'teacher.source = "{run.config.teacher.source}" is not planned: convert the teacher '
            '(tools/convert_checkpoint.py) and use "online"'
        )
    students = list(_student_layouts(run, cluster))
    if not students:
        raise ConfigError(
            f"no layout of {cluster.ranks} ranks divides this model and batch.global_batch_size = "
            f"{run.config.batch.global_batch_size}: change the number of ranks or the batch"
        )
    teachers: list[_TeacherLayout] = []
    if run.has_live_teacher:
        teachers = sorted(_teacher_layouts(run, cluster, rates), key=lambda layout: layout.seconds)
    combinations = [_combine(student, run, teachers, cluster, rates) for student in students]
    fitting = [pair.fastest for pair in combinations if pair.fastest is not None]
    needs = [pair.smallest for pair in combinations if pair.smallest is not None]
    smallest = min(needs, key=lambda need: need[0], default=None)
    if smallest is None or not fitting:
        raise _no_fit_error(smallest, cluster)
    plans: list[LayoutPlan] = []
    for _, candidate in sorted(fitting, key=lambda pair: pair[0]):
        plan = evaluate(candidate, cluster, rates)
        plans += [plan] if plan.peak.total <= cluster.memory else []
        if len(plans) == keep:
            break
    return SearchResult(
        sorted(plans, key=lambda plan: plan.time.seconds),
        len(students) * max(1, len(teachers)),
        evaluate(smallest[1], cluster, rates),
    )


@dataclass(frozen=True)
class _Combination:
    """Hold the best of one student layout with all layouts of the teacher.

    Attributes:
        fastest: seconds of a step and run of the fastest that fits; None where none fits.
        smallest: bytes and run of the one that needs least memory; None where none is possible.
    """

    fastest: tuple[float, PlannedRun] | None
    smallest: tuple[float, PlannedRun] | None


def _combine(
    student: PlannedRun,
    run: PlannedRun,
    teachers: list[_TeacherLayout],
    cluster: Cluster,
    rates: ComputeRates,
) -> _Combination:
    choices = list(_teacher_choices(student, run, teachers, cluster, rates))
    if not choices:
        return _Combination(None, None)
    least = min(choices, key=lambda choice: choice.bytes)
    smallest = (least.bytes, _with_choice(student, run, least.layout))
    fitting = [choice for choice in choices if choice.bytes <= cluster.memory]
    if not fitting:
        return _Combination(None, smallest)
    # The first of equals is the teacher in the student's layout, which needs no exchange.
    best = min(fitting, key=lambda choice: choice.seconds)
    seconds = sum(student_time(student, cluster, rates.student).values()) + best.seconds
    return _Combination((seconds, _with_choice(student, run, best.layout)), smallest)


def _no_fit_error(smallest: tuple[float, PlannedRun] | None, cluster: Cluster) -> ConfigError:
    if smallest is None:
        return ConfigError(
            "no layout of the teacher divides it and batch.global_batch_size: change the number of "
            "ranks or the batch"
        )
    needed, config = smallest[0], smallest[1].config
    layout = f"tensor {config.parallel.tensor} x pipeline {config.parallel.pipeline}"
    layout += ", model.recompute = full" if config.model.recompute == "full" else ""
    return ConfigError(
        f"nothing fits: the layout that needs least ({layout}) takes {needed / GIB:.1f} GiB a rank "
        f"of {cluster.memory / GIB:.1f}: take GPUs with more memory, more of them, shorter "
        "sequences, a smaller model, or a cached teacher"
    )


def _student_layouts(run: PlannedRun, cluster: Cluster) -> Iterator[PlannedRun]:
    """Yield the layouts of the student that the program accepts, without a teacher."""
    config, ranks = run.config, cluster.ranks
    tensors = _divisors(min(cluster.gpus_per_node, ranks))
    for tensor, pipeline in product(tensors, _divisors(ranks)):
        if ranks % (tensor * pipeline) or config.model.num_layers % pipeline:
            continue
        data = ranks // (tensor * pipeline)
        chunks = _divisors(config.model.num_layers // pipeline)
        options = product(
            chunks if pipeline > 1 else [1],
            [False, True] if tensor > 1 else [False],
            MICRO_BATCHES,
            ("none", "full"),
            [False, True] if data > 1 else [False],
        )
        for virtual, sequence_parallel, micro_batch_size, recompute, distributed in options:
            parallel = {
                "tensor": tensor,
                "pipeline": pipeline,
                "virtual_pipeline": virtual,
                "sequence_parallel": sequence_parallel,
                "overlap_grad_reduce": run.device == "cuda" and data > 1,
                "overlap_param_gather": run.device == "cuda" and distributed,
            }
            layout = _StudentLayout(parallel, micro_batch_size, recompute, distributed)
            student = layout.apply(config)
            if student is not None and _divides(student, ranks):
                yield replace(run, config=student, teacher=None)


@dataclass(frozen=True)
class _StudentLayout:
    """Hold the values of a run file that the search varies for the student."""

    parallel: Mapping[str, object]
    micro_batch_size: int
    recompute: str
    distributed: bool

    def apply(self, config: RunConfig) -> RunConfig | None:
        """Return the run file with this layout, or None where its checks refuse it."""
        teacher = config.teacher.model_copy(
            update={"parallel": TeacherParallelSection(), "micro_batch_size": None}
        )
        sections = {name: getattr(config, name) for name in RunConfig.model_fields}
        sections |= {
            "teacher": teacher,
            "model": config.model.model_copy(update={"recompute": self.recompute}),
            "optimizer": config.optimizer.model_copy(update={"distributed": self.distributed}),
            "batch": config.batch.model_copy(update={"micro_batch_size": self.micro_batch_size}),
        }
        try:
            parallel = ParallelSection.model_validate(self.parallel)
            return RunConfig.model_validate({**sections, "parallel": parallel})
        except ValidationError:
            return None


def _divides(config: RunConfig, ranks: int) -> bool:
    try:
        config.data_parallel_size(ranks)
    except ConfigError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


@dataclass(frozen=True)
class _TeacherLayout:
    """Hold one separate layout of the teacher and its cost beside any student.

    Attributes:
        seconds: time of its part of a step.
        weights: bytes of its weights on the largest stage.
        temporary: bytes of its temporary memory at the peak.
    """

    tensor: int
    pipeline: int
    micro_batch_size: int
    seconds: float
    weights: float
    temporary: float

    def apply(self, config: RunConfig) -> RunConfig:
        """Return the run file with the teacher in this layout."""
        return _with_teacher_layout(config, self.tensor, self.pipeline, self.micro_batch_size)


def _teacher_layouts(
    run: PlannedRun, cluster: Cluster, rates: ComputeRates
) -> Iterator[_TeacherLayout]:
    """Yield the separate layouts of the teacher over the same ranks that the program accepts."""
    if run.config.distill.dense or not run.config.teacher.uses_megatron:
        return
    assert run.teacher is not None
    base = _StudentLayout({}, 1, "none", False).apply(run.config)
    if base is None:
        return
    for tensor, pipeline, micro_batch_size in product(
        _divisors(min(cluster.gpus_per_node, cluster.ranks)),
        _divisors(min(16, cluster.ranks)),
        MICRO_BATCHES,
    ):
        if cluster.ranks % (tensor * pipeline):
            continue
        candidate = replace(
            run, config=_with_teacher_layout(base, tensor, pipeline, micro_batch_size)
        )
        try:
            if candidate.config.teacher_problem(run.teacher, cluster.ranks) is not None:
                continue
        except ConfigError:
            continue
        weights, temporary = separate_teacher_bytes(candidate, cluster.ranks)
        seconds = teacher_time(candidate, cluster, rates.teacher)
        yield _TeacherLayout(tensor, pipeline, micro_batch_size, seconds, weights, temporary)


def _with_teacher_layout(
    config: RunConfig, tensor: int, pipeline: int, micro_batch_size: int
) -> RunConfig:
    section = config.teacher.model_copy(
        update={
            "parallel": TeacherParallelSection(tensor=tensor, pipeline=pipeline),
            "micro_batch_size": micro_batch_size,
        }
    )
    return config.model_copy(update={"teacher": section})


@dataclass(frozen=True)
class _TeacherChoice:
    """Hold the cost of a student layout with one layout of the teacher.

    Attributes:
        bytes: memory of the rank that needs most.
        seconds: time of the teacher's part of a step.
        layout: separate layout of the teacher; None: the student's, or no live teacher.
    """

    bytes: float
    seconds: float
    layout: _TeacherLayout | None


def _teacher_choices(
    student: PlannedRun,
    run: PlannedRun,
    teachers: list[_TeacherLayout],
    cluster: Cluster,
    rates: ComputeRates,
) -> Iterator[_TeacherChoice]:
    """Yield the ways to place the teacher beside a student layout.

    Without a live teacher there is one; otherwise the student's layout comes first, then each
    separate layout.
    """
    if not run.has_live_teacher:
        largest = max(map(sum, student_stage_bytes(student, cluster.ranks)))
        yield _TeacherChoice(cluster.framework + largest, 0.0, None)
        return
    assert run.teacher is not None
    if student.config.teacher_problem(run.teacher, cluster.ranks) is None:
        both = replace(student, teacher=run.teacher)
        memory = run_memory(both, cluster.ranks, framework=cluster.framework)
        seconds = teacher_time(both, cluster, rates.teacher)
        yield _TeacherChoice(peak_rank(memory).total, seconds, None)
    stages = student_stage_bytes(student, cluster.ranks) if teachers else []
    for layout in teachers:
        largest = max(
            permanent + layout.weights + max(temporary, layout.temporary)
            for permanent, temporary in stages
        )
        yield _TeacherChoice(cluster.framework + largest, layout.seconds, layout)


def _with_choice(student: PlannedRun, run: PlannedRun, layout: _TeacherLayout | None) -> PlannedRun:
    """Return the student's layout with the teacher that was chosen for it."""
    config = student.config if layout is None else layout.apply(student.config)
    return replace(student, config=config, teacher=run.teacher)
