"""Time a training step without a teacher, one with an online teacher, and the teacher's forward.

    python tools/bench_step.py                                         # one process, CPU or GPU
    torchrun --nproc-per-node 2 tools/bench_step.py --tensor 2         # any layout
    torchrun --nproc-per-node 2 tools/bench_step.py --teacher-tensor 2 # another one for the teacher

All three are measured in one process, in turn, round after round, so that a slow phase of the
machine hits all of them; the ratio is formed within a round. An online step should cost no more
than a plain step and a bare teacher forward together: what is above 1 is the cost of selecting
targets and of the distillation loss.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from bench.harness import format_ms, run_benchmark
from bench.step import measure, size_parser

from megatron_kd.parallel.world import world_from_environment


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; rank 0 prints a table, or JSON."""
    arguments = _parser().parse_args(argv)
    rank, _, local_rank = world_from_environment()
    from megatron_kd.parallel.platform import start_platform

    def start_and_measure() -> dict[str, Any]:
        start_platform(arguments.device, local_rank)
        return measure(arguments)

    return run_benchmark("bench_step", arguments, start_and_measure, _table, rank=rank)


def _parser() -> argparse.ArgumentParser:
    parser = size_parser(__doc__)
    add = parser.add_argument
    add("--tensor", type=int, default=1, help="tensor-parallel size")
    add("--pipeline", type=int, default=1, help="pipeline-parallel size")
    add("--teacher-tensor", type=int, help="tensor-parallel size of the teacher (the student's)")
    add(
        "--teacher-pipeline", type=int, help="pipeline-parallel size of the teacher (the student's)"
    )
    return parser


def _table(result: dict[str, Any]) -> str:
    titles = {
        "plain": "step, language-model loss only",
        "teacher": "bare teacher forward",
        "online": "step with the online teacher",
    }
    torch_version = result["versions"]["torch"]
    lines = [f"{result['device']}, torch {torch_version}, commit {result['commit']}", ""]
    for name, title in titles.items():
        lines.append(f"{title:34} {format_ms(result['seconds'][name])}")
    for name in ("online / (plain + teacher)", "online / plain"):
        ratio = result[name]
        lines.append(
            f"{name:34} {ratio['median']:9.3f}      ({ratio['min']:.3f} .. {ratio['max']:.3f})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
