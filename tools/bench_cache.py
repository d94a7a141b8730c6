"""Size, speed and fidelity of stored teacher targets: this project's records beside other layouts, on a real teacher's targets.

    python tools/bench_cache.py --config run.toml                        # teacher, data and sequence length of a student's run file
    python tools/bench_cache.py --config run.toml --samples 64 --json --output cache.json

The teacher reads samples of data.train; what it says is chosen in several ways, and each choice is stored and read back by every
layout: one process, one core, in turn, round after round, read 8 samples at a time as a microbatch is. KL is that of what is read
from what was stored, both on the kept ids.

  records          this project's (quantized; fp32 where it says so), see megatron_kd/cache/FORMAT.md
  megatron         Megatron-LM's layout: fp16 value, low 16 bits of the id, a byte for the rest (there one bit, which ends at 131,072
                   ids), as wide as the sample's widest token, under zstd
  arrays           int32 ids and fp32 values, as wide, under zstd

Published for DistillKit (its README): about 114 bytes/token for 50 entries, about 300 for 128.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from megatron_kd.cache.decode import decode_many
from megatron_kd.cache.encode import encode
from megatron_kd.config import ConfigError, RunConfig, load_config
from megatron_kd.storage.provenance import commit
from megatron_kd.targets import SampleSelection, Selection, SparseTarget, TopSelection

SELECTIONS: dict[str, Selection] = {
    "50 draws": SampleSelection(50, seed=0),
    # As few ids as draws from a teacher of much lower entropy name.
    "50 draws at 0.7": SampleSelection(50, seed=0, temperature=0.7),
    "top-p 0.95 of top-50": TopSelection(50, top_p=0.95),
    "top-p 0.95 of top-100": TopSelection(100, top_p=0.95),
    "top-64": TopSelection(64),
}
RECORD_OVERHEAD = 28  # bytes of a record beside its payload: key, length, checksum, Arrow's offset
MICROBATCH = 8  # samples that are read together
PUBLISHED = {"DistillKit, 50 entries": 114, "DistillKit, 128 entries": 300}


@dataclass(frozen=True)
class Layout:
    """How one sample's target [S, K] becomes bytes; and how those of several come back."""

    name: str
    encode: Callable[[SparseTarget], bytes]
    decode: Callable[[Sequence[bytes]], list[SparseTarget]]
    overhead: int = 0


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and print a table, or JSON."""
    arguments, rest = _parser().parse_known_args(argv)
    try:
        result = measure(
            load_config(["--config", arguments.config, "--teacher.source", "online", *rest]),
            arguments,
        )
    except ConfigError as error:
        print(f"bench_cache: error: {error}", file=sys.stderr)
        return 2
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2) if arguments.json else _table(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        required=True,
        help="run file of a student; its keys can be overridden as --section.key value",
    )
    parser.add_argument(
        "--samples", type=int, default=32, help="samples stored; their tokens are printed"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=7,
        help="measured rounds; one more comes first and is not counted",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", help="also write JSON to this file")
    return parser


def measure(config: RunConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the targets, then store and read them; the whole report."""
    made = targets_of_teacher(config, arguments.samples)
    torch.set_num_threads(1)
    rows = [
        row for name, targets in made.items() for row in _compare(name, targets, arguments.rounds)
    ]
    first = next(iter(made.values()))
    return {
        "commit": commit(),
        "machine": f"{platform.machine()}, {platform.processor() or platform.system()}",
        "versions": {name: version(name) for name in ("torch", "numpy", "pyarrow")},
        "tokens": sum(len(target.indices) for target in first),
        "teacher": {
            "checkpoint": Path(str(config.teacher.checkpoint)).name,
            "entropy": _mean([target.entropy for target in first]),
        },
        "rounds": arguments.rounds,
        "layouts": rows,
        "published": PUBLISHED,
    }


def targets_of_teacher(config: RunConfig, samples: int) -> dict[str, list[SparseTarget]]:
    """By name of the selection, the targets [S, K] of the first samples of data.train."""
    from megatron_kd.parallel.groups import start_groups, stop_groups
    from megatron_kd.parallel.platform import start_platform
    from megatron_kd.teacher.extract import ShardPlan, make_microbatches
    from megatron_kd.teacher.runtime.online import build_online_teacher
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
        parts = token_dataset(
            config, inputs, TokenFiles("data.train", config.data.train), 1
        ).prefixes
        plan = ShardPlan(parts, samples, samples)
        batches = [
            batch
            for _, batch in make_microbatches(
                plan.samples(0),
                1,
                groups.platform.device,
                config.data.document_attention == "within",
            )
        ]
        found = {}
        for name, selection in SELECTIONS.items():
            teacher.make_target = SelectTargets(
                selection, groups, inputs.vocab_size, False, config.distill.chunk_tokens
            )
            found[name] = [
                target.map(lambda t: t[:, 0].cpu())
                for batch in batches
                for target in teacher.targets([batch])
            ]
        return found
    finally:
        stop_groups()


def layouts(name: str) -> list[Layout]:
    """Those that a selection is stored in."""
    selection = SELECTIONS[name]
    draws = selection.num_draws if isinstance(selection, SampleSelection) else None
    records = Layout(
        "records", lambda target: encode(target, num_draws=draws), _decode_records, RECORD_OVERHEAD
    )
    exact = Layout(
        "records, fp32",
        lambda target: encode(target, value_encoding="fp32"),
        _decode_records,
        RECORD_OVERHEAD,
    )
    return [
        records,
        *([exact] if draws is None else []),
        Layout("megatron", *_arrays(np.float16, 16)),
        Layout("arrays", *_arrays(np.float32, 32)),
    ]


def _decode_records(records: Sequence[bytes]) -> list[SparseTarget]:
    found = decode_many(records)
    return [
        found.map(lambda tensor, number=number: tensor[number]) for number in range(len(records))
    ]


def _arrays(
    values: type, bits: int
) -> tuple[Callable[[SparseTarget], bytes], Callable[[Sequence[bytes]], list[SparseTarget]]]:
    """Rectangular arrays under zstd; ids as 32 bits, or as 16 bits and a byte for what is above."""
    codec = pa.Codec("zstd", compression_level=3)

    def write(target: SparseTarget) -> bytes:
        width = int((target.indices >= 0).sum(1).max())
        ids, logprobs = (
            target.indices[:, :width].numpy(),
            target.logprobs[:, :width].numpy().astype(values),
        )
        parts = [ids] if bits == 32 else [ids.astype(np.uint16), (ids >> 16).astype(np.int8)]
        data = b"".join(part.tobytes() for part in [*parts, logprobs])
        return np.array([*ids.shape, len(data)], np.int32).tobytes() + bytes(
            codec.compress(data, asbytes=True)
        )

    def read(data: bytes) -> SparseTarget:
        rows, width, size = np.frombuffer(data[:12], np.int32)
        plain = codec.decompress(data[12:], int(size), asbytes=True)
        count = int(rows) * int(width)
        ids = np.frombuffer(plain, np.int32 if bits == 32 else np.uint16, count).astype(np.int32)
        if bits == 16:
            ids |= np.frombuffer(plain, np.int8, count, 2 * count).astype(np.int32) << 16
        logprobs = np.frombuffer(plain, values, count, (4 if bits == 32 else 3) * count).astype(
            np.float32
        )
        return SparseTarget(
            torch.from_numpy(ids.reshape(rows, width)),
            torch.from_numpy(logprobs.reshape(rows, width)),
        )

    return write, lambda records: [read(record) for record in records]


def _compare(name: str, targets: list[SparseTarget], rounds: int) -> list[dict[str, Any]]:
    tokens = sum(len(target.indices) for target in targets)
    kept = sum(int((target.indices >= 0).sum()) for target in targets) / tokens
    mass = _mean([target.logprobs.double().exp().sum(1) for target in targets])
    candidates = layouts(name)
    rates: dict[str, dict[str, list[float]]] = {
        layout.name: {"encode": [], "decode": []} for layout in candidates
    }
    stored: dict[str, list[bytes]] = {}
    for number in range(rounds + 1):
        for layout in candidates:
            begin = time.perf_counter()
            data = [layout.encode(target) for target in targets]
            middle = time.perf_counter()
            for start in range(0, len(data), MICROBATCH):
                layout.decode(data[start : start + MICROBATCH])
            end = time.perf_counter()
            stored[layout.name] = data
            if number:
                rates[layout.name]["encode"].append(tokens / (middle - begin))
                rates[layout.name]["decode"].append(tokens / (end - middle))
    return [
        {
            "selection": name,
            "entries_per_token": kept,
            "kept_mass": mass,
            "layout": layout.name,
            "bytes_per_token": (sum(map(len, stored[layout.name])) + layout.overhead * len(targets))
            / tokens,
            **{
                f"{kind}_tokens_per_second": _spread(found)
                for kind, found in rates[layout.name].items()
            },
            **_fidelity(targets, layout.decode(stored[layout.name])),
        }
        for layout in candidates
    ]


def _fidelity(exact: list[SparseTarget], read: list[SparseTarget]) -> dict[str, float | bool]:
    """KL of the kept distributions, nats: mean and largest of all tokens; largest error of a log-probability; whether ids are equal."""
    divergences, errors, equal = [], [], True
    for ours, theirs in zip(exact, read, strict=True):
        (ids, values), (other_ids, other_values) = _rising(ours), _rising(theirs)
        width = min(ids.shape[1], other_ids.shape[1])
        used = (ids >= 0)[:, :width]
        equal &= torch.equal(ids[:, :width], other_ids[:, :width]) and int((ids >= 0).sum()) == int(
            (other_ids >= 0).sum()
        )
        values, other_values = values[:, :width].double(), other_values[:, :width].double()
        difference = torch.where(used, values.log_softmax(1) - other_values.log_softmax(1), 0.0)
        divergences.append((values.softmax(1) * difference).sum(1))
        errors.append(torch.where(used, values - other_values, 0.0).abs().amax(1))
    divergence, error = torch.cat(divergences), torch.cat(errors)
    return {
        "kl_mean": float(divergence.mean()),
        "kl_max": float(divergence.max()),
        "error_max": float(error.max()),
        "ids_equal": equal,
    }


def _rising(target: SparseTarget) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and log-probabilities by rising id, unused slots last."""
    order = torch.where(target.indices >= 0, target.indices, torch.iinfo(torch.int32).max).argsort(
        dim=1, stable=True
    )
    return target.indices.gather(1, order), target.logprobs.gather(1, order)


def _mean(parts: list[torch.Tensor | None]) -> float | None:
    return (
        None
        if any(part is None for part in parts)
        else float(torch.cat([part for part in parts if part is not None]).double().mean())
    )


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"commit {result['commit']}, {result['machine']}, {result['tokens']} tokens",
        f"entropy of the teacher {result['teacher']['entropy']:.3f} nats",
        f"{'layout':16}{'bytes/token':>12}{'encode tok/s':>14}{'decode tok/s':>14}{'mean KL':>11}{'max KL':>11}{'max error':>11}",
    ]
    selection = None
    for row in result["layouts"]:
        if row["selection"] != selection:
            selection = row["selection"]
            lines.append(
                f"{selection}: {row['entries_per_token']:.1f} entries/token, mass {row['kept_mass']:.3f}"
            )
        speeds = "".join(
            f"{row[f'{kind}_tokens_per_second']['median']:>14,.0f}" for kind in ("encode", "decode")
        )
        wrong = "" if row["ids_equal"] else "  WRONG IDS"
        lines.append(
            f"  {row['layout']:14}{row['bytes_per_token']:>12.1f}{speeds}{row['kl_mean']:>11.1e}{row['kl_max']:>11.1e}"
            f"{row['error_max']:>11.1e}{wrong}"
        )
    lines += [
        f"published: {name}: about {size} bytes/token" for name, size in result["published"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
