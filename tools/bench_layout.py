"""Time training steps over layouts of student and teacher: plain, cached, online, teacher alone.

    torchrun --nproc-per-node 2 tools/bench_layout.py                # every layout on two ranks
    torchrun --nproc-per-node 2 tools/bench_layout.py --student 1x2 --teacher 1x2
        --overlap none,drain --kinds plain,online,teacher
    torchrun --nproc-per-node 8 tools/bench_layout.py --device cuda --precision bf16
        --student 1x1,2x1 --teacher same,8x1

A layout is TENSORxPIPELINE or TENSORxPIPELINExVIRTUAL; the remaining ranks are data-parallel. All
jobs of one pair of layouts run in one process group, in turn, round after round, and ratios are
formed within a round, so that a slow phase of the machine hits all of them. Every round begins with
the next kind of step, because caches stay warm or cold. Pairs come one after the other. On a CPU
the same ratios of processor seconds are reported: they do not count waiting for the operating
system.

Shares of a step: "waiting" is measured. It is the part of the step in which a rank does not
compute, as a mean over the ranks (on a CPU, time without processor time in the step's thread; on a
GPU, time in a profiled step without a kernel other than NCCL's). "bubble" is what the pipeline
schedules alone cause, by planning/placement.py with the measured forward and backward times.
"communication" is the rest of waiting: messages, and work that is spread unevenly.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from bench.harness import run_benchmark
from bench.layout import KINDS, JobKey, layout_config, measure
from bench.layout_model import BenchLayout
from bench.step import size_parser, teacher_shape

from megatron_kd.config import ConfigError, RunConfig
from megatron_kd.parallel.world import world_from_environment

OVERLAPS = ("none", "drain", "auto")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; rank 0 prints a table, or JSON."""
    arguments = _parser().parse_args(argv)
    rank, world_size, local_rank = world_from_environment()
    from megatron_kd.parallel.platform import start_platform

    def check_and_measure() -> dict[str, Any]:
        _check_words(arguments)
        students, teachers = _students(arguments, world_size), _teachers(arguments, world_size)
        for student, teacher in product(students, teachers):
            key = JobKey("online", teacher, "auto")
            config = layout_config(arguments, Path("nowhere"), student, key)
            _check_sizes(arguments, config, world_size)
        start_platform(arguments.device, local_rank)
        return measure(arguments, students, teachers)

    return run_benchmark("bench_layout", arguments, check_and_measure, _table, rank=rank)


def _parser() -> argparse.ArgumentParser:
    parser = size_parser(__doc__)
    parser.add_argument(
        "--student",
        default="all",
        help="layouts, comma-separated (all: tensor and pipeline sizes of 1 and 2 that fit)",
    )
    parser.add_argument(
        "--teacher",
        default="all",
        help='layouts, among them "same", the student\'s (all: as for the student, and same)',
    )
    parser.add_argument(
        "--overlap",
        default="none",
        help=f"placements of online teachers: any of {', '.join(OVERLAPS)}, comma-separated",
    )
    parser.add_argument(
        "--kinds", default=",".join(KINDS), help=f"what to time, of {', '.join(KINDS)}"
    )
    return parser


def _check_words(arguments: argparse.Namespace) -> None:
    for name, choices in (("kinds", KINDS), ("overlap", OVERLAPS)):
        for word in getattr(arguments, name).split(","):
            if word not in choices:
                raise ConfigError(f"--{name}: {word} is none of {', '.join(choices)}")


def _students(arguments: argparse.Namespace, world_size: int) -> list[BenchLayout]:
    if arguments.student == "all":
        return _fitting(world_size)
    if "same" in arguments.student.split(","):
        raise ConfigError('--student: "same" is for --teacher')
    return [_parse_layout(text) for text in arguments.student.split(",")]


def _teachers(arguments: argparse.Namespace, world_size: int) -> list[BenchLayout | None]:
    if arguments.teacher == "all":
        return [None, *_fitting(world_size)]
    return [
        None if text == "same" else _parse_layout(text) for text in arguments.teacher.split(",")
    ]


def _fitting(world_size: int) -> list[BenchLayout]:
    return [
        BenchLayout(tensor, pipeline)
        for tensor, pipeline in product((1, 2), (1, 2))
        if world_size % (tensor * pipeline) == 0
    ]


def _parse_layout(text: str) -> BenchLayout:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(x[1-9]\d*)?", text):
        raise ConfigError(f"{text} is not a layout: write TENSORxPIPELINE, such as 2x1")
    return BenchLayout(*(int(size) for size in text.split("x")))


def _check_sizes(arguments: argparse.Namespace, config: RunConfig, world_size: int) -> None:
    """Raise ConfigError if the ranks or the models cannot be divided like this."""
    config.data_parallel_size(world_size)
    tensor, pipeline, _ = config.teacher_layout(world_size)
    shape = teacher_shape(arguments, config.model)
    for name, size, kind, ranks in shape.indivisible_sizes(tensor=tensor, stages=pipeline):
        raise ConfigError(
            f"the teacher's {name} ({size}) must be a multiple of "
            f"its {kind}-parallel size ({ranks})"
        )


def _table(result: dict[str, Any]) -> str:
    torch_version = result["versions"]["torch"]
    lines = [
        f"{result['device']}, {result['world']} ranks, torch {torch_version}, "
        f"commit {result['commit']}",
        "",
        f"{'student':8} {'teacher':8} {'run':22} {'ms':>8} {'(min .. max)':>22} "
        f"{'waiting':>8} {'bubble':>7} {'comm.':>6}  ratio",
    ]
    return "\n".join([*lines, *map(_line, result["runs"])])


def _line(run: dict[str, Any]) -> str:
    student, teacher = str(BenchLayout(**run["student"])), run["teacher"] or "-"
    if isinstance(teacher, dict):
        teacher = str(BenchLayout(**teacher))
    kind = run["kind"]
    if kind == "online":
        kind += f", {run['overlap']}{' (a step ahead)' if run['ahead'] else ''}"
    seconds = {name: value * 1e3 for name, value in run["seconds"].items()}
    limits = f"({seconds['min']:.1f} .. {seconds['max']:.1f})"
    waiting, bubble, communication = (
        f"{run[name]:.0%}" if run[name] is not None else ""
        for name in ("waiting", "bubble", "communication")
    )
    ratios = "; ".join(
        f"{name} {ratio['median']:.3f} ({ratio['min']:.2f} .. {ratio['max']:.2f})"
        for name, ratio in run["ratios"].items()
    )
    return (
        f"{student:8} {teacher:8} {kind:22} {seconds['median']:8.1f} {limits:>22} "
        f"{waiting:>8} {bubble:>7} {communication:>6}  {ratios}"
    )


if __name__ == "__main__":
    sys.exit(main())
