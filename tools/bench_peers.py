"""List the losses that tools/bench_head.py times, and which of them can run on this machine.

    python tools/bench_peers.py

The list has this project's losses, plain torch's, megatron-core's and those of other libraries. A
library is used if it can be imported; nothing is installed. Every variant takes the student's final
hidden states and its output weight and returns the mean of its loss over the tokens;
tools/bench_head.py compares the gradients with fp64.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from bench.harness import add_device
from bench.head_registry import VARIANTS
from bench.head_variants import Unavailable


def main(argv: Sequence[str] | None = None) -> int:
    """Print which variants can run, and why the others cannot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_device(parser)
    kind = parser.parse_args(argv).device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    for variant in VARIANTS:
        try:
            variant.prepare(torch.device(kind))
            status = "runs"
        except Unavailable as reason:
            status = str(reason)
        print(f"{variant.name:22} {variant.computes:20} teacher {variant.teacher:7} {status}")
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
