"""Measure size, speed and fidelity of stored teacher targets, in this and in other layouts.

    python tools/bench_cache.py --config run.toml     # teacher, data and length of a student's run
    python tools/bench_cache.py --config run.toml --samples 64 --json --output cache.json

The teacher reads samples of data.train. Its targets are selected in several ways, and each
selection is stored and read back in every layout: one process, one core, in turn, round after
round, read 8 samples at a time as a microbatch is. KL is that of what is read from what was stored,
both on the kept ids.

  records          this project's (quantized, or fp32), see megatron_kd/cache/FORMAT.md
  megatron         Megatron-LM's layout: fp16 value, low 16 bits of the id, a byte for the rest
                   (one bit in Megatron-LM, which ends at 131,072 ids), as wide as the sample's
                   widest token, under zstd
  arrays           int32 ids and fp32 values, as wide, under zstd

Published for DistillKit (its README): about 114 bytes/token for 50 entries, about 300 for 128.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench.cache_layouts import StorageLayout, fidelity, storage_layouts
from bench.harness import Spread, add_run_file, bench_parser, provenance, run_benchmark, spread

from megatron_kd.config import RunConfig, load_config
from megatron_kd.targets import SampleSelection, Selection, SparseTarget, TopSelection

SELECTIONS: dict[str, Selection] = {
    "50 draws": SampleSelection(50, seed=0),
    # As few distinct ids as samples from a teacher of much lower entropy.
    "50 draws at 0.7": SampleSelection(50, seed=0, temperature=0.7),
    "top-p 0.95 of top-50": TopSelection(50, top_p=0.95),
    "top-p 0.95 of top-100": TopSelection(100, top_p=0.95),
    "top-64": TopSelection(64),
}
MICROBATCH = 8  # samples that are read together
PUBLISHED = {"DistillKit, 50 entries": 114, "DistillKit, 128 entries": 300}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print a table, or JSON."""
    arguments, overrides = _parser().parse_known_args(argv)

    def load_and_measure() -> dict[str, Any]:
        online = ["--teacher.source", "online"]
        return measure(load_config(["--config", arguments.config, *online, *overrides]), arguments)

    return run_benchmark("bench_cache", arguments, load_and_measure, _table)


def _parser() -> argparse.ArgumentParser:
    parser = bench_parser(
        __doc__, rounds=7, rounds_help="measured rounds; one more comes first and is not counted"
    )
    add_run_file(parser)
    parser.add_argument(
        "--samples", type=int, default=32, help="samples stored; their tokens are printed"
    )
    return parser


def measure(config: RunConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the targets of every selection, then store and read them."""
    targets_by_selection = targets_of_teacher(config, arguments.samples)
    torch.set_num_threads(1)
    layouts = [
        line
        for name, targets in targets_by_selection.items()
        for line in _compare(name, targets, arguments.rounds)
    ]
    first = next(iter(targets_by_selection.values()))
    return {
        **provenance("torch", "numpy", "pyarrow"),
        "machine": f"{platform.machine()}, {platform.processor() or platform.system()}",
        "tokens": sum(len(target.indices) for target in first),
        "teacher": {
            "checkpoint": Path(str(config.teacher.checkpoint)).name,
            "entropy": _mean([target.entropy for target in first]),
        },
        "rounds": arguments.rounds,
        "layouts": layouts,
        "published": PUBLISHED,
    }


def targets_of_teacher(config: RunConfig, samples: int) -> dict[str, list[SparseTarget]]:
    """Return the targets [S, K] of the first samples of data.train, by selection."""
    from megatron_kd.parallel.groups import start_groups, stop_groups
    from megatron_kd.parallel.platform import start_platform
    from megatron_kd.teacher.extract import ShardPlan, make_microbatches
    from megatron_kd.teacher.runtime.online_teacher import build_online_teacher
    from megatron_kd.teacher.runtime.targets import SelectTargets
    from megatron_kd.train.datasets import TokenFiles, token_dataset
    from megatron_kd.train.startup.input_checks import check_inputs

    inputs = check_inputs(config, world_size=1)
    groups = start_groups(
        start_platform(config.train.device, 0),
        config.parallel,
        timeout_seconds=config.train.timeout_seconds,
    )
    try:
        teacher = build_online_teacher(config, inputs.teacher, groups)
        files = TokenFiles("data.train", config.data.train)
        prefixes = token_dataset(config, inputs, files, 1).prefixes
        plan = ShardPlan(prefixes, samples, samples)
        batches = [
            batch
            for _, batch in make_microbatches(
                plan.samples(0),
                1,
                groups.platform.device,
                config.data.document_attention == "within",
            )
        ]
        targets = {}
        for name, selection in SELECTIONS.items():
            teacher.make_target = SelectTargets(
                selection, groups, inputs.vocab_size, False, config.distill.chunk_tokens
            )
            targets[name] = [
                target.map(lambda tensor: tensor[:, 0].cpu())
                for batch in batches
                for target in teacher.targets([batch])
            ]
        return targets
    finally:
        stop_groups()


def _compare(name: str, targets: list[SparseTarget], rounds: int) -> list[dict[str, Any]]:
    """Store and read the targets of one selection in every layout."""
    tokens = sum(len(target.indices) for target in targets)
    layouts = storage_layouts(SELECTIONS[name])
    rates: dict[str, dict[str, list[float]]] = {
        layout.name: {"encode": [], "decode": []} for layout in layouts
    }
    stored: dict[str, list[bytes]] = {}
    for number in range(rounds + 1):
        for layout in layouts:
            stored[layout.name], encode_seconds, decode_seconds = _store_and_read(layout, targets)
            if number:
                rates[layout.name]["encode"].append(tokens / encode_seconds)
                rates[layout.name]["decode"].append(tokens / decode_seconds)
    entries = sum(int((target.indices >= 0).sum()) for target in targets)
    mass = _mean([target.logprobs.double().exp().sum(1) for target in targets])
    lines = []
    for layout in layouts:
        size = sum(map(len, stored[layout.name])) + layout.overhead * len(targets)
        lines.append(
            {
                "selection": name,
                "entries_per_token": entries / tokens,
                "kept_mass": mass,
                "layout": layout.name,
                "bytes_per_token": size / tokens,
                **_speeds(rates[layout.name]),
                **fidelity(targets, layout.decode(stored[layout.name])),
            }
        )
    return lines


def _store_and_read(
    layout: StorageLayout, targets: list[SparseTarget]
) -> tuple[list[bytes], float, float]:
    """Return the stored bytes of each sample, and the seconds of encoding and decoding."""
    start = time.perf_counter()
    data = [layout.encode(target) for target in targets]
    middle = time.perf_counter()
    for first in range(0, len(data), MICROBATCH):
        layout.decode(data[first : first + MICROBATCH])
    return data, middle - start, time.perf_counter() - middle


def _speeds(rates: dict[str, list[float]]) -> dict[str, Spread]:
    return {f"{kind}_tokens_per_second": spread(values) for kind, values in rates.items()}


def _mean(parts: list[torch.Tensor | None]) -> float | None:
    tensors = [part for part in parts if part is not None]
    return float(torch.cat(tensors).double().mean()) if len(tensors) == len(parts) else None


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"commit {result['commit']}, {result['machine']}, {result['tokens']} tokens",
        f"entropy of the teacher {result['teacher']['entropy']:.3f} nats",
        f"{'layout':16}{'bytes/token':>12}{'encode tok/s':>14}{'decode tok/s':>14}"
        f"{'mean KL':>11}{'max KL':>11}{'max error':>11}",
    ]
    selection = None
    for layout in result["layouts"]:
        if layout["selection"] != selection:
            selection = layout["selection"]
            entries = f"{layout['entries_per_token']:.1f} entries/token"
            lines.append(f"{selection}: {entries}, mass {layout['kept_mass']:.3f}")
        speeds = "".join(
            f"{layout[f'{kind}_tokens_per_second']['median']:>14,.0f}"
            for kind in ("encode", "decode")
        )
        errors = "".join(f"{layout[key]:>11.1e}" for key in ("kl_mean", "kl_max", "error_max"))
        note = "" if layout["ids_equal"] else "  WRONG IDS"
        lines.append(
            f"  {layout['layout']:14}{layout['bytes_per_token']:>12.1f}{speeds}{errors}{note}"
        )
    lines += [
        f"published: {name}: about {size} bytes/token" for name, size in result["published"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
