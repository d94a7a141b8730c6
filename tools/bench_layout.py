"""Time of a training step over layouts of student and teacher: plain, with a cached teacher, with an online one, and the teacher alone.

    torchrun --nproc-per-node 2 tools/bench_layout.py                                   # every layout of student and teacher on two ranks
    torchrun --nproc-per-node 2 tools/bench_layout.py --student 1x2 --teacher 1x2 --overlap none,drain --kinds plain,online,teacher
    torchrun --nproc-per-node 8 tools/bench_layout.py --device cuda --precision bf16 --student 1x1,2x1 --teacher same,8x1

A layout is TENSORxPIPELINE or TENSORxPIPELINExVIRTUAL; what remains of the ranks is data-parallel. All that belongs to one pair of layouts
runs in one process group, in turn, round after round, and ratios are formed within a round, so that a slow moment of the machine hits
each alike; every round begins with the next kind of step, for what ran before leaves caches warm or cold. Pairs come one after the
other. On a CPU the same ratios of processor seconds are given: they leave out whom the operating system made wait.

Shares of a step: "waiting" is measured, the part of it in which a rank does not compute, mean over the ranks (on a CPU, time without
processor time in the step's thread; on a GPU, time without a kernel that is not NCCL's, in a profiled step). "bubble" is what the pipeline
schedules alone make of it, by planning/placement.py with the measured forward and backward times; "communication" is the rest of
waiting: messages, and work spread unevenly.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import bench_step as step_bench
from pydantic import ValidationError

from megatron_kd.config import ConfigError, RunConfig, dump_toml
from megatron_kd.parallel.world import world_from_environment
from megatron_kd.planning.placement import PipelineWork, Placement, placed_step_time
from megatron_kd.storage.provenance import commit

KINDS = ("plain", "cached", "online", "teacher")


class Layout(NamedTuple):
    """Sizes of one model; None (a teacher's): the student's."""

    tensor: int
    pipeline: int
    virtual: int = 1

    def __str__(self) -> str:
        return f"{self.tensor}x{self.pipeline}" + (f"x{self.virtual}" if self.virtual > 1 else "")


class Timed(NamedTuple):
    """One thing to time: what it is, the teacher's layout, and the function. ahead, reverse: the placement that `overlap` came to."""

    kind: str
    teacher: Layout | None
    overlap: str
    task: Callable[[], object]
    ahead: bool = False
    reverse: bool = False


def main() -> int:
    """Run the benchmark; rank 0 prints a table, or JSON."""
    arguments = _parser().parse_args()
    rank, world_size, local_rank = world_from_environment()
    from megatron_kd.parallel.platform import start_platform

    try:
        students, teachers = _layouts(arguments, world_size)
        for student, teacher in product(students, teachers):
            _check(
                arguments,
                _config(arguments, Path("nowhere"), "online", student, teacher, "auto"),
                world_size,
            )
        start_platform(arguments.device, local_rank)
        result = measure(arguments, students, teachers)
    except ConfigError as error:
        print(f"bench_layout: error: {error}", file=sys.stderr)
        return 2
    if rank == 0:
        if arguments.output:
            Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(result, indent=2) if arguments.json else _table(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = step_bench.parser(__doc__)
    parser.add_argument(
        "--student",
        default="all",
        help="layouts, comma-separated (all: tensor and pipeline sizes of 1 and 2 that fit)",
    )
    parser.add_argument(
        "--teacher",
        default="all",
        help='layouts, "same" (the student\'s) among them (all: as for the student, and same)',
    )
    parser.add_argument(
        "--overlap",
        default="none",
        help="how online teachers are placed: any of none, drain, auto, comma-separated",
    )
    parser.add_argument(
        "--kinds", default=",".join(KINDS), help=f"what to time, of {', '.join(KINDS)}"
    )
    return parser


def _layouts(
    arguments: argparse.Namespace, world_size: int
) -> tuple[list[Layout], list[Layout | None]]:
    fitting = [
        Layout(tensor, pipeline)
        for tensor, pipeline in product((1, 2), (1, 2))
        if world_size % (tensor * pipeline) == 0
    ]

    def read(text: str) -> Layout | None:
        if text == "same":
            return None
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(x[1-9]\d*)?", text):
            raise ConfigError(f"{text} is not a layout: write TENSORxPIPELINE, such as 2x1")
        return Layout(*(int(size) for size in text.split("x")))

    students = (
        fitting
        if arguments.student == "all"
        else [read(text) for text in arguments.student.split(",")]
    )
    teachers = (
        [None, *fitting]
        if arguments.teacher == "all"
        else [read(text) for text in arguments.teacher.split(",")]
    )
    if None in students:
        raise ConfigError('--student: "same" is for --teacher')
    for name, given, known in (
        ("kinds", arguments.kinds, KINDS),
        ("overlap", arguments.overlap, ("none", "drain", "auto")),
    ):
        for word in given.split(","):
            if word not in known:
                raise ConfigError(f"--{name}: {word} is none of {', '.join(known)}")
    return [each for each in students if each is not None], teachers


def measure(
    arguments: argparse.Namespace, students: list[Layout], teachers: list[Layout | None]
) -> dict[str, Any]:
    """Time everything. Collective over the world."""
    import torch

    from megatron_kd.parallel.groups import stop_groups

    _, world_size, _ = world_from_environment()
    with step_bench.shared_folder(arguments) as folder:
        step_bench.save_random_teacher(arguments, folder)
        if "cached" in arguments.kinds:
            _make_cache(arguments, folder)
        runs: list[dict[str, Any]] = []
        for student, teacher in product(students, teachers):
            # Groups keep threads: those of the pairs before must not fight with the measured ones for the cores.
            stop_groups()
            runs += _of_pair(arguments, folder, student, teacher, cached=teacher == teachers[0])
        on_gpu = torch.cuda.is_available() and arguments.device != "cpu"
        stop_groups()
    return {
        "settings": vars(arguments),
        "world": world_size,
        "device": torch.cuda.get_device_name()
        if on_gpu
        else f"CPU {platform.machine()}, {torch.get_num_threads()} threads a rank",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit(),
        "runs": runs,
    }


def _config(
    arguments: argparse.Namespace,
    folder: Path,
    kind: str,
    student: Layout,
    teacher: Layout | None,
    overlap: str,
) -> RunConfig:
    plain = step_bench.run_config(arguments, folder, "plain").model_dump(
        mode="json", exclude_none=True
    )
    plain["parallel"] = {
        "tensor": student.tensor,
        "pipeline": student.pipeline,
        "virtual_pipeline": student.virtual,
    }
    plain["run"]["directory"] = str(folder / f"run-{kind}-{student}-{teacher}-{overlap}")
    if kind == "cached":
        plain["teacher"] = {"source": "cached", "cache": str(folder / "targets")}
    if kind == "online":
        own = (
            {}
            if teacher is None
            else {"parallel": {"tensor": teacher.tensor, "pipeline": teacher.pipeline}}
        )
        plain["teacher"] = {
            "source": "online",
            "checkpoint": str(folder / "teacher"),
            "overlap": overlap,
            **own,
        }
        if teacher is not None:
            plain["teacher"]["micro_batch_size"] = (
                arguments.teacher_micro_batch or arguments.micro_batch
            )
    try:
        return RunConfig.model_validate(plain)
    except ValidationError as error:
        raise ConfigError(
            f"student {student}, teacher {teacher or 'same'}: {error.errors()[0]['msg']}"
        ) from error


def _check(arguments: argparse.Namespace, config: RunConfig, world_size: int) -> None:
    """ConfigError where the ranks or the models cannot be cut like this."""
    config.data_parallel_size(world_size)
    tensor, pipeline, _ = config.teacher_layout(world_size)
    for name, size, by, ranks in step_bench.teacher_shape(
        arguments, config.model
    ).indivisible_sizes(tensor=tensor, stages=pipeline):
        raise ConfigError(
            f"the teacher's {name} ({size}) must be a multiple of its {by}-parallel size ({ranks})"
        )


def _make_cache(arguments: argparse.Namespace, folder: Path) -> None:
    """The teacher's targets of every sample, by tools/cache_teacher.py in one process of rank 0's. Collective over the world."""
    from megatron_kd.parallel.collectives import from_rank_zero

    config = _config(arguments, folder, "online", Layout(1, 1), None, "none")

    def make() -> None:
        (folder / "cache.toml").write_text(dump_toml(config), encoding="utf-8")
        tool = Path(__file__).with_name("cache_teacher.py")
        command = [
            sys.executable,
            str(tool),
            "--config",
            str(folder / "cache.toml"),
            "--output",
            str(folder / "targets"),
        ]
        alone = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        done = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(f"the cache could not be made: {done.stderr.strip()[-300:]}")

    from_rank_zero(make)


def _of_pair(
    arguments: argparse.Namespace,
    folder: Path,
    student: Layout,
    teacher: Layout | None,
    *,
    cached: bool,
) -> list[dict[str, Any]]:
    """Everything at one pair of layouts, round after round. Collective over the world, which it joins."""
    from megatron_kd.parallel.groups import can_reverse_stages
    from megatron_kd.teacher.online import Source
    from megatron_kd.train.build import build_run
    from megatron_kd.train.step import train_step

    rendezvous = (
        f"file://{folder}/rendezvous-{student}-{teacher}"  # torchrun's own serves one world
    )
    kinds, overlaps, jobs = arguments.kinds.split(","), arguments.overlap.split(","), []
    for kind in ("plain", "cached") if cached else ("plain",):
        if kind in kinds:
            run = build_run(
                _config(arguments, folder, kind, student, None, "none"), rendezvous=rendezvous
            )
            jobs.append(Timed(kind, None, "none", lambda run=run: train_step(run)))
    for overlap in overlaps if {"online", "teacher"} & {*kinds} else ():
        run = build_run(
            _config(arguments, folder, "online", student, teacher, overlap), rendezvous=rendezvous
        )
        if "teacher" in kinds and overlap == overlaps[0]:
            jobs.append(Timed("teacher", teacher, "none", _bare(run)))
        if "online" in kinds:
            placement = Source(run.config).placement(
                run.inputs.teacher, run.groups.world_size, can_reverse=can_reverse_stages()
            )
            jobs.append(
                Timed(
                    "online",
                    teacher,
                    overlap,
                    lambda run=run: train_step(run),
                    placement.prefetch,
                    placement.reverse,
                )
            )
    times, busy, waits = _time(arguments, jobs)
    names = [_name(job) for job in jobs]
    seconds, worked = (
        dict(zip(names, times, strict=True)),
        dict(zip(names, busy, strict=True)) if busy else None,
    )
    return [
        _row(arguments, student, job, seconds, worked, waiting)
        for job, waiting in zip(jobs, waits, strict=True)
    ]


def _bare(run: Any) -> Callable[[], object]:
    """The teacher's layers and logits on this rank's share of a step."""
    alone, share = run.teacher.local_work(run.train_data.microbatches(0))
    return lambda: step_bench.bare_forward(alone, share)


def _time(
    arguments: argparse.Namespace, jobs: list[Timed]
) -> tuple[list[list[float]], list[list[float]] | None, list[float]]:
    """Seconds of each job in each round, this rank's processor seconds (on a CPU), and the share in which ranks wait, mean over them.

    Collective over the world.
    """
    import torch
    import torch.distributed as dist

    on_gpu = dist.get_backend() == "nccl"
    times: list[list[float]] = [[] for _ in jobs]
    busy: list[list[float]] = [[] for _ in jobs]
    for number in range(-1, arguments.rounds):
        for index in _from(number, len(jobs)):
            job = jobs[index]
            dist.barrier()
            begin, worked = time.perf_counter(), time.thread_time()
            job.task()
            if on_gpu:
                torch.cuda.synchronize()
            worked = time.thread_time() - worked
            dist.barrier()
            if number >= 0:
                times[index].append(time.perf_counter() - begin)
                busy[index].append(worked)
    shares = (
        [_computing_on_gpu(job.task) for job in jobs]
        if on_gpu
        else [sum(b) / sum(t) for b, t in zip(busy, times, strict=True)]
    )
    total = torch.tensor(
        shares, dtype=torch.float64, device=torch.cuda.current_device() if on_gpu else "cpu"
    )
    dist.all_reduce(total)
    return times, None if on_gpu else busy, (1 - total / dist.get_world_size()).clamp(0).tolist()


def _from(number: int, count: int) -> list[int]:
    """The order of `count` jobs in a round: each round begins with the next."""
    return [(number + index) % count for index in range(count)]


def _computing_on_gpu(task: Callable[[], object]) -> float:
    """Share of a step in which a kernel runs that is not a collective's."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    begin = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        task()
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    spans = sorted(
        (each.time_range.start, each.time_range.end)
        for each in found.events()
        if "nccl" not in each.name.lower()
    )
    covered, end = 0.0, float("-inf")
    for start, stop in spans:
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return min(1.0, covered / 1e6 / seconds)


def _name(job: Timed) -> tuple[str, Layout | None, str]:
    return job.kind, job.teacher, job.overlap


def _row(
    arguments: argparse.Namespace,
    student: Layout,
    job: Timed,
    times: dict[Any, list[float]],
    busy: dict[Any, list[float]] | None,
    waiting: float,
) -> dict[str, Any]:
    """What is known of one job; ratios to others of the same rounds. times, busy: by `_name`."""
    seconds, plain, alone = (
        times[_name(job)],
        times.get(("plain", None, "none")),
        times.get(("teacher", job.teacher, "none")),
    )
    ratios = _ratios(job, times)
    if busy is not None:
        ratios |= {
            f"processor seconds: {name}": found for name, found in _ratios(job, busy).items()
        }
    bubble, modelled = _bubble(arguments, student, job, plain, alone)
    return {
        "kind": job.kind,
        "student": student._asdict(),
        "teacher": None
        if job.kind in ("plain", "cached")
        else "same"
        if job.teacher is None
        else job.teacher._asdict(),
        "overlap": job.overlap if job.kind == "online" else None,
        "ahead": job.ahead,
        "seconds": step_bench.spread(seconds),
        "modelled_seconds": modelled,
        "waiting": waiting,
        "bubble": bubble,
        "communication": None if bubble is None else max(0.0, waiting - bubble),
        "ratios": ratios,
    }


def _ratios(job: Timed, times: dict[Any, list[float]]) -> dict[str, dict[str, float]]:
    seconds, plain, alone = (
        times[_name(job)],
        times.get(("plain", None, "none")),
        times.get(("teacher", job.teacher, "none")),
    )
    ratios = {}
    if job.kind in ("cached", "online") and plain is not None:
        ratios[f"{job.kind} / plain"] = step_bench.spread(
            [a / b for a, b in zip(seconds, plain, strict=True)]
        )
    if job.kind == "online" and plain is not None and alone is not None:
        ratios["online / (plain + teacher)"] = step_bench.spread(
            [a / (b + c) for a, b, c in zip(seconds, plain, alone, strict=True)]
        )
    other = times.get(("online", job.teacher, "none"))
    if job.kind == "online" and job.overlap != "none" and other is not None:
        ratios[f"{job.overlap} / none"] = step_bench.spread(
            [a / b for a, b in zip(seconds, other, strict=True)]
        )
    return ratios


def _bubble(
    arguments: argparse.Namespace,
    student: Layout,
    job: Timed,
    plain: list[float] | None,
    alone: list[float] | None,
) -> tuple[float | None, float | None]:
    """Share of the step that the pipelines' schedules leave idle; and an online step's seconds by them, from its two parts' seconds."""
    import torch.distributed as dist

    world, layout = dist.get_world_size(), job.teacher or student
    micro = (
        arguments.micro_batch
        if job.teacher is None
        else arguments.teacher_micro_batch or arguments.micro_batch
    )

    def rounds(each: Layout, micro_batch: int) -> float:
        return arguments.batch * each.tensor * each.pipeline / (micro_batch * world)

    def slots(each: Layout, micro_batch: int) -> float:
        return rounds(each, micro_batch) + (each.pipeline - 1) / each.virtual

    own, theirs = rounds(student, arguments.micro_batch), rounds(layout, micro)
    forward_only = layout._replace(virtual=1)
    if job.kind == "teacher":
        return 1 - theirs / slots(forward_only, micro), None
    if job.kind != "online":
        return 1 - own / slots(student, arguments.micro_batch), None
    if plain is None or alone is None:
        return None, None
    unit = (
        step_bench.spread(plain)["median"] / slots(student, arguments.micro_batch) / 3
    )  # a backward pass is two forward passes
    forward = step_bench.spread(alone)["median"] / slots(forward_only, micro)
    ours = PipelineWork(
        world, student.tensor, student.pipeline, int(own), unit, 2 * unit, student.virtual
    )
    other = PipelineWork(world, layout.tensor, layout.pipeline, int(theirs), forward)
    seconds = placed_step_time(
        ours,
        other,
        Placement(job.ahead, job.reverse),
        same_layout=job.teacher is None and not job.reverse,
    )
    return 1 - (own * 3 * unit + theirs * forward) / seconds, seconds


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['device']}, {result['world']} ranks, torch {result['versions']['torch']}, commit {result['commit']}",
        "",
        f"{'student':8} {'teacher':8} {'run':22} {'ms':>8} {'(least .. greatest)':>22} {'waiting':>8} {'bubble':>7} {'comm.':>6}  ratio",
    ]
    for row in result["runs"]:
        teacher = row["teacher"] if row["teacher"] in (None, "same") else Layout(**row["teacher"])
        what = row["kind"] + (
            f", {row['overlap']}{' (a step ahead)' * row['ahead']}"
            if row["kind"] == "online"
            else ""
        )
        seconds = {name: value * 1e3 for name, value in row["seconds"].items()}
        shares = [
            f"{row[name]:.0%}" if row[name] is not None else ""
            for name in ("waiting", "bubble", "communication")
        ]
        ratios = "; ".join(
            f"{name} {value['median']:.3f} ({value['min']:.2f} .. {value['max']:.2f})"
            for name, value in row["ratios"].items()
        )
        reach = f"({seconds['min']:.1f} .. {seconds['max']:.1f})"
        lines.append(
            f"{Layout(**row['student'])!s:8} {teacher or '-'!s:8} {what:22} {seconds['median']:8.1f} {reach:>22} "
            f"{shares[0]:>8} {shares[1]:>7} {shares[2]:>6}  {ratios}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
