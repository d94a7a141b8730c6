"""Measure time, memory and gradient error of the output head: this project's and others'.

    python tools/bench_head.py                                   # a few minutes on a CPU
    python tools/bench_head.py --only megatron-fused-ce,head-chunk --json
    python tools/bench_head.py --near 0.1 --dtype bf16 --output head.json

Each variant goes from the student's final hidden states and output weight to the gradients of both:
one process, the same inputs, in turn, round after round; ratios are formed within a round. The
student is the teacher plus a little noise (--near), as late in training, where rounded logits cost
most. A variant whose gradient is further from its own loss in fp64 than its limit is not timed.
Memory is the peak beyond the inputs. It includes both gradients, except for head-direct, which adds
the weight's to a buffer that megatron-core has anyway. A missing library is left out with a line.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from bench.harness import add_device, bench_parser, report
from bench.head import measure
from bench.head_reference import DTYPES
from bench.head_registry import BASELINE, PLAIN, PRODUCT, VARIANTS
from bench.head_variants import NO_GRADIENT

DEFAULTS = {
    "cpu": {"tokens": 2048, "hidden": 512, "vocab": 32768, "dtype": "fp32"},
    "cuda": {"tokens": 8192, "hidden": 4096, "vocab": 128256, "dtype": "bf16"},
}
LEGEND = """\
KL is KL(teacher || student); top-k are the teacher's kept entries, rescaled to sum to 1. Ratios:
/ Megatron to megatron-core's fused cross-entropy and / torch to torch's, both on full logits and
without distillation. "product" and "targets" have no student, and their second ratio is to the bare
product. Errors are relative, to the gradients of the named loss in fp64."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print a table, or JSON.

    Returns:
        The exit code: 1 if a variant of this project has a wrong gradient or fails.
    """
    arguments = parse_arguments(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler prints to stderr
    result = measure(arguments)
    report(arguments, result, _table)
    return int(
        any(
            variant["own"] and variant["status"] in ("wrong gradient", "failed")
            for variant in result["variants"]
        )
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options; sizes that are not set depend on the device."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, value in DEFAULTS[arguments.device].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.teacher_hidden = arguments.teacher_hidden or arguments.hidden
    arguments.only = [name for name in arguments.only.split(",") if name]
    unknown = set(arguments.only) - {variant.name for variant in VARIANTS}
    if unknown:
        parser.error(f"--only: no variant {', '.join(sorted(unknown))}")
    sizes = (arguments.tokens, arguments.hidden, arguments.teacher_hidden, arguments.rounds)
    if min(sizes) < 1 or arguments.near <= 0:
        parser.error(
            "--tokens, --hidden, --teacher-hidden and --rounds must be at least 1, --near above 0"
        )
    if not 1 <= arguments.top_k < arguments.vocab:
        parser.error("--top-k must be at least 1 and below --vocab")
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = bench_parser(
        __doc__,
        rounds=5,
        rounds_help="measured rounds; one more comes first, for gradients and memory",
    )
    add_device(parser)
    add = parser.add_argument
    add(
        "--dtype", choices=list(DTYPES), help="of hidden states and weights (CPU: fp32, CUDA: bf16)"
    )
    add("--tokens", type=int, help="CPU: 2048, CUDA: 8192")
    add("--hidden", type=int, help="width of the student (CPU: 512, CUDA: 4096)")
    add("--teacher-hidden", type=int, help="width of the teacher (the student's)")
    add("--vocab", type=int, help="CPU: 32768, CUDA: 128256")
    add("--top-k", type=int, default=64, help="kept entries of the teacher")
    add(
        "--alpha",
        type=float,
        default=0.5,
        help="weight of the distillation loss where there is a cross-entropy too",
    )
    add(
        "--near",
        type=float,
        default=0.02,
        help="standard deviation of the student's logits from the teacher's",
    )
    add("--seed", type=int, default=0, help="of the random inputs")
    names = ", ".join(variant.name for variant in VARIANTS)
    add("--only", default="", help=f"names, comma-separated: {names}")
    return parser


def _table(result: dict[str, Any]) -> str:
    options = result["options"]
    versions = ", ".join(
        f"{name} {version}" for name, version in result["versions"].items() if version
    )
    sizes = ", ".join(
        f"{name} {options[name]}"
        for name in ("tokens", "hidden", "vocab", "top_k", "alpha", "near", "dtype", "rounds")
    )
    commit = f"commit {result['commit']}"
    header = (
        f"{'variant':21}{'loss':21}{'teacher':8}{'ms (min .. max)':>28}{'/ Megatron':>11}"
        f"{'/ torch':>9}{'MiB':>9}{'d hidden':>10}{'d weight':>10}"
    )
    lines = [f"{result['device']}, {result['threads']} threads; {versions}; {commit}", sizes, ""]
    lines += [header, "-" * len(header), *map(_line, result["variants"])]
    return "\n".join([*lines, "", LEGEND])


def _line(variant: dict[str, Any]) -> str:
    start = f"{variant['name']:21}{variant['computes']:21}{variant['teacher']:8}"
    if variant["seconds"] is None:
        return f"{start}{variant['reason']}"
    low, middle, high = (variant["seconds"][key] * 1e3 for key in ("min", "median", "max"))
    times = f"{middle:.1f} ({low:.1f} .. {high:.1f})"
    baselines = (BASELINE, PRODUCT if variant["computes"] in NO_GRADIENT else PLAIN)
    ratios = [
        f"{variant['ratio'][name]['median']:.2f}" if name in variant["ratio"] else "-"
        for name in baselines
    ]
    error = variant["error"]
    errors = [f"{error[key]:.1e}" if key in error else "-" for key in ("hidden", "weight")]
    if "logprobs" in error:
        errors = [f"{error['logprobs']:.1e}", "(targets)"]
    memory = variant["peak_bytes"] / 2**20
    numbers = f"{ratios[0]:>11}{ratios[1]:>9}{memory:9.1f}{errors[0]:>10}{errors[1]:>10}"
    return f"{start}{times:>28}{numbers}"


if __name__ == "__main__":
    sys.exit(main())
