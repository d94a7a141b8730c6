"""Time training steps over layouts of student and teacher, and their shares of waiting."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from megatron_kd.config import ConfigError, RunConfig, dump_toml
from megatron_kd.parallel.world import world_from_environment

from .harness import Spread, paired_ratios, provenance, spread
from .layout_model import BenchLayout, StepModel
from .step import run_config, save_random_teacher, shared_folder, teacher_forward

KINDS = ("plain", "cached", "online", "teacher")
_CACHE_TOOL = Path(__file__).resolve().parents[1] / "cache_teacher.py"


class JobKey(NamedTuple):
    """Name a job: its kind, the teacher's layout (None: the student's), and the overlap."""

    kind: str
    teacher: BenchLayout | None = None
    overlap: str = "none"


@dataclass(frozen=True)
class TimedJob:
    """Hold what is timed. `prefetch` and `reverse` are the placement that the overlap came to."""

    key: JobKey
    task: Callable[[], object]
    prefetch: bool = False
    reverse: bool = False


@dataclass(frozen=True)
class Timings:
    """Hold the times of all jobs of a pair of layouts.

    Attributes:
        seconds: Seconds of each round, by job.
        cpu_seconds: Processor seconds of this rank in each round, by job. None on a GPU.
        waiting: Share of a step in which ranks wait, mean over ranks, by job.
    """

    seconds: dict[JobKey, list[float]]
    cpu_seconds: dict[JobKey, list[float]] | None
    waiting: dict[JobKey, float]


def measure(
    arguments: argparse.Namespace,
    students: list[BenchLayout],
    teachers: list[BenchLayout | None],
) -> dict[str, Any]:
    """Time every pair of layouts.

    Args:
        arguments: The parsed options.
        students: Layouts of the student.
        teachers: Layouts of the teacher; None is the student's.

    Returns:
        The result for JSON.

    Collectives:
        Over the world.
    """
    import torch

    from megatron_kd.parallel.groups import stop_groups

    _, world_size, _ = world_from_environment()
    with shared_folder(arguments) as folder:
        save_random_teacher(arguments, folder)
        if "cached" in arguments.kinds:
            _make_cache(arguments, folder)
        runs: list[dict[str, Any]] = []
        for student, teacher in product(students, teachers):
            # Threads of earlier groups must not compete with the measured ones for the cores.
            stop_groups()
            cached = teacher == teachers[0]
            runs += _measure_pair(arguments, folder, student, teacher, cached=cached)
        on_gpu = torch.cuda.is_available() and arguments.device != "cpu"
        stop_groups()
    threads = torch.get_num_threads()
    return {
        "settings": vars(arguments),
        "world": world_size,
        "device": torch.cuda.get_device_name()
        if on_gpu
        else f"CPU {platform.machine()}, {threads} threads a rank",
        **provenance("torch"),
        "runs": runs,
    }


def layout_config(
    arguments: argparse.Namespace, folder: Path, student: BenchLayout, key: JobKey
) -> RunConfig:
    """Return the run file of a job.

    Args:
        arguments: The sizes.
        folder: Folder of the token files, the teacher and the runs.
        student: Layout of the student.
        key: Kind of run, layout of the teacher, and overlap.

    Raises:
        ConfigError: Student and teacher do not fit together.
    """
    content = run_config(arguments, folder, "plain").model_dump(mode="json", exclude_none=True)
    content["parallel"] = {
        "tensor": student.tensor,
        "pipeline": student.pipeline,
        "virtual_pipeline": student.virtual,
    }
    name = f"run-{key.kind}-{student}-{key.teacher}-{key.overlap}"
    content["run"]["directory"] = str(folder / name)
    if key.kind == "cached":
        content["teacher"] = {"source": "cached", "cache": str(folder / "targets")}
    if key.kind == "online":
        content["teacher"] = {
            "source": "online",
            "checkpoint": str(folder / "teacher"),
            "overlap": key.overlap,
        }
        if key.teacher is not None:
            sizes = {"tensor": key.teacher.tensor, "pipeline": key.teacher.pipeline}
            micro_batch = arguments.teacher_micro_batch or arguments.micro_batch
            content["teacher"] |= {"parallel": sizes, "micro_batch_size": micro_batch}
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise ConfigError(
            f"student {student}, teacher {key.teacher or 'same'}: {message}"
        ) from error


def _make_cache(arguments: argparse.Namespace, folder: Path) -> None:
    """Store the teacher's targets of every sample, by tools/cache_teacher.py in one process.

    Collectives:
        Over the world.
    """
    from megatron_kd.parallel.collectives import from_rank_zero

    config = layout_config(arguments, folder, BenchLayout(1, 1), JobKey("online"))

    def make() -> None:
        run_file = folder / "cache.toml"
        run_file.write_text(dump_toml(config), encoding="utf-8")
        options = ["--config", str(run_file), "--output", str(folder / "targets")]
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        process = subprocess.run(
            [sys.executable, str(_CACHE_TOOL), *options],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if process.returncode:
            raise ConfigError(f"the cache could not be made: {process.stderr.strip()[-300:]}")

    from_rank_zero(make)


def _measure_pair(
    arguments: argparse.Namespace,
    folder: Path,
    student: BenchLayout,
    teacher: BenchLayout | None,
    *,
    cached: bool,
) -> list[dict[str, Any]]:
    """Time all jobs of one pair of layouts, round after round.

    Collectives:
        Over the world, whose groups it starts.
    """
    import torch.distributed as dist

    jobs = _jobs(arguments, folder, student, teacher, cached=cached)
    timings = _time(jobs, arguments.rounds)
    model = StepModel(arguments, dist.get_world_size(), student)
    return [_result(job, timings, model) for job in jobs]


def _jobs(
    arguments: argparse.Namespace,
    folder: Path,
    student: BenchLayout,
    teacher: BenchLayout | None,
    *,
    cached: bool,
) -> list[TimedJob]:
    """Build the runs of one pair of layouts. Collective over the world."""
    from megatron_kd.parallel.groups import can_reverse_stages
    from megatron_kd.teacher.online import Source
    from megatron_kd.train.build import build_run
    from megatron_kd.train.step import train_step

    # torchrun's own rendezvous serves one world only.
    rendezvous = f"file://{folder}/rendezvous-{student}-{teacher}"

    def build(key: JobKey) -> Any:
        return build_run(layout_config(arguments, folder, student, key), rendezvous=rendezvous)

    def step_of(run: Any) -> Callable[[], object]:
        return lambda: train_step(run)

    kinds, overlaps, jobs = arguments.kinds.split(","), arguments.overlap.split(","), []
    for kind in ("plain", "cached") if cached else ("plain",):
        if kind in kinds:
            jobs.append(TimedJob(JobKey(kind), step_of(build(JobKey(kind)))))
    if not {"online", "teacher"} & {*kinds}:
        return jobs
    for overlap in overlaps:
        key = JobKey("online", teacher, overlap)
        run = build(key)
        if "teacher" in kinds and overlap == overlaps[0]:
            jobs.append(TimedJob(JobKey("teacher", teacher), teacher_forward(run)))
        if "online" in kinds:
            placement = Source(run.config).placement(
                run.inputs.teacher, run.groups.world_size, can_reverse=can_reverse_stages()
            )
            jobs.append(TimedJob(key, step_of(run), placement.prefetch, placement.reverse))
    return jobs


def _time(jobs: list[TimedJob], rounds: int) -> Timings:
    """Time jobs in turn. Every round begins with the next one, because caches stay warm or cold.

    Collectives:
        Over the world.
    """
    import torch
    import torch.distributed as dist

    on_gpu = dist.get_backend() == "nccl"
    seconds: dict[JobKey, list[float]] = {job.key: [] for job in jobs}
    cpu_seconds: dict[JobKey, list[float]] = {job.key: [] for job in jobs}
    for number in range(-1, rounds):
        for index in range(len(jobs)):
            job = jobs[(number + index) % len(jobs)]
            dist.barrier()
            start, cpu_start = time.perf_counter(), time.thread_time()
            job.task()
            if on_gpu:
                torch.cuda.synchronize()
            cpu = time.thread_time() - cpu_start
            dist.barrier()
            if number >= 0:
                seconds[job.key].append(time.perf_counter() - start)
                cpu_seconds[job.key].append(cpu)
    computing = [
        _computing_on_gpu(job.task) if on_gpu else sum(cpu_seconds[job.key]) / sum(seconds[job.key])
        for job in jobs
    ]
    device = torch.cuda.current_device() if on_gpu else "cpu"
    total = torch.tensor(computing, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    shares = (1 - total / dist.get_world_size()).clamp(0).tolist()
    waiting = {job.key: share for job, share in zip(jobs, shares, strict=True)}
    return Timings(seconds, None if on_gpu else cpu_seconds, waiting)


def _computing_on_gpu(task: Callable[[], object]) -> float:
    """Return the share of a step in which a kernel runs that is not a collective's."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        task()
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if "nccl" not in event.name.lower()
    )
    covered, end = 0.0, float("-inf")
    for span_start, span_end in spans:
        covered += max(0.0, span_end - max(span_start, end))
        end = max(end, span_end)
    return min(1.0, covered / 1e6 / seconds)


def _result(job: TimedJob, timings: Timings, model: StepModel) -> dict[str, Any]:
    """Return what is known of one job, with ratios to other jobs of the same rounds."""
    key = job.key
    ratios = _ratios(key, timings.seconds)
    if timings.cpu_seconds is not None:
        cpu_ratios = _ratios(key, timings.cpu_seconds)
        ratios |= {f"processor seconds: {name}": ratio for name, ratio in cpu_ratios.items()}
    plain = timings.seconds.get(JobKey("plain"))
    teacher = timings.seconds.get(JobKey("teacher", key.teacher))
    modelled, bubble = None, None
    if key.kind == "teacher":
        bubble = model.teacher_bubble(key.teacher)
    elif key.kind != "online":
        bubble = model.student_bubble()
    elif plain is not None and teacher is not None:
        parts = spread(plain)["median"], spread(teacher)["median"]
        modelled, bubble = model.online_step(key.teacher, parts, job.prefetch, job.reverse)
    waiting = timings.waiting[key]
    layout = "same" if key.teacher is None else key.teacher._asdict()
    return {
        "kind": key.kind,
        "student": model.student._asdict(),
        "teacher": layout if key.kind in ("online", "teacher") else None,
        "overlap": key.overlap if key.kind == "online" else None,
        "ahead": job.prefetch,
        "seconds": spread(timings.seconds[key]),
        "modelled_seconds": modelled,
        "waiting": waiting,
        "bubble": bubble,
        "communication": None if bubble is None else max(0.0, waiting - bubble),
        "ratios": ratios,
    }


def _ratios(key: JobKey, times: dict[JobKey, list[float]]) -> dict[str, Spread]:
    """Return the ratios of a job to others, formed within rounds."""
    seconds, plain = times[key], times.get(JobKey("plain"))
    teacher = times.get(JobKey("teacher", key.teacher))
    sequential = times.get(JobKey("online", key.teacher))
    ratios = {}
    if key.kind in ("cached", "online") and plain is not None:
        ratios[f"{key.kind} / plain"] = spread(paired_ratios(seconds, plain))
    if key.kind == "online" and plain is not None and teacher is not None:
        ratios["online / (plain + teacher)"] = spread(paired_ratios(seconds, plain, teacher))
    if key.kind == "online" and key.overlap != "none" and sequential is not None:
        ratios[f"{key.overlap} / none"] = spread(paired_ratios(seconds, sequential))
    return ratios
