"""What a checkpoint costs the training: windows of steps without a save, with one that is waited for, and with one that is not.

    torchrun --nproc-per-node 2 tools/bench_save.py --config examples/quickstart/student.toml --run.directory /tmp/bench
    ... --teacher.source online --teacher.checkpoint runs/quickstart/teacher          # the distilled student of the quickstart

A save begins before the first step of a window and is looked at after each, as in training. "stalled" is how long the training stood still
for it, "slower" what the whole window took more than one without: it includes what the writing takes from the cores. Both in steps, formed
within one round; the checkpoints go to checkpoints-* in run.directory, which is not to hold a run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from megatron_kd.config import ConfigError, RunConfig, load_config
from megatron_kd.parallel.world import world_from_environment
from megatron_kd.storage.provenance import commit

KINDS = ("none", "waited for", "asynchronous")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; rank 0 prints."""
    arguments, rest = _parser().parse_known_args(argv)
    rank, _, local_rank = world_from_environment()
    try:
        if min(arguments.rounds, arguments.window) < 2:
            raise ConfigError("--rounds and --window must be at least 2")
        steps = len(KINDS) * (2 + arguments.rounds * arguments.window)
        config = load_config(
            [
                "--config",
                arguments.config,
                *rest,
                "--train.steps",
                str(steps),
                "--checkpoint.resume",
                "false",
            ]
        )
        from megatron_kd.parallel.platform import start_platform

        start_platform(config.train.device, local_rank)
        result = measure(config, arguments)
    except ConfigError as error:
        print(f"bench_save: error: {error}", file=sys.stderr)
        return 2
    if rank == 0:
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
        help="run file; its keys can be overridden as --section.key value",
    )
    parser.add_argument("--rounds", type=int, default=9, help="windows of each kind")
    parser.add_argument("--window", type=int, default=12, help="steps of a window")
    parser.add_argument(
        "--threads", type=int, help="threads of torch on a CPU; unset: as the environment says"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", help="also write JSON to this file")
    return parser


def measure(config: RunConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time all kinds, in turn. Collective over the world."""
    from dataclasses import replace

    import torch

    from megatron_kd.checkpoint.saver import Saver
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.train.build import build_run

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    run = build_run(config)
    runs = {KINDS[0]: run}
    for kind in KINDS[1:]:
        section = config.checkpoint.model_copy(update={"asynchronous": kind == "asynchronous"})
        folder = config.run.directory / f"checkpoints-{kind.replace(' ', '-')}" / "checkpoints"
        runs[kind] = replace(
            run,
            saver=Saver(
                folder, section, device=run.groups.platform.device, watchdog=run.groups.watchdog
            ),
        )
    windows: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for number in range(arguments.rounds + 1):
        for kind in KINDS:
            found = _window(runs[kind], 2 if number == 0 else arguments.window, save=kind != "none")
            if number:
                windows[kind].append(found)
    for kind in KINDS[1:]:
        runs[kind].saver.verifier.close()
    threads, world = torch.get_num_threads(), run.groups.world_size
    stop_groups()
    steps = [each["seconds"] / arguments.window for each in windows["none"]]
    return {
        "commit": commit(),
        "machine": f"{platform.machine()}, {world} ranks, {threads} threads a rank",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rounds": arguments.rounds,
        "window": arguments.window,
        "step seconds": _spread(steps),
        "bytes": sum(
            path.stat().st_size
            for path in max(runs["asynchronous"].saver.checkpoints.glob("step-*")).iterdir()
        ),
        **{kind: _in_steps(windows, kind, arguments.window) for kind in KINDS[1:]},
    }


def _window(run: Any, steps: int, *, save: bool) -> dict[str, float]:
    """Seconds of the window's steps, and of those the ones in which the training stood still; of a save until it is complete."""
    import torch.distributed as dist

    from megatron_kd.parallel.groups import seed_step
    from megatron_kd.train.step import train_step

    dist.barrier()
    begin = time.perf_counter()
    if save:
        run.save()
    stalled, complete = time.perf_counter() - begin, 0.0
    for _ in range(steps):
        seed_step(run.config.train.seed, run.progress.step, run.groups)
        train_step(run)
        looked = time.perf_counter()
        on_its_way = run.saver.poll()
        stalled += time.perf_counter() - looked
        if not on_its_way and not complete:
            complete = time.perf_counter() - begin
    seconds = time.perf_counter() - begin
    # Not part of the window: nothing may be left over for the next one.
    run.saver.finish()
    return {
        "seconds": seconds,
        "stalled": stalled,
        "complete": complete or time.perf_counter() - begin,
    }


def _in_steps(windows: dict[str, list[dict[str, float]]], kind: str, window: int) -> dict[str, Any]:
    pairs = [
        (saved, plain["seconds"] / window)
        for saved, plain in zip(windows[kind], windows["none"], strict=True)
    ]
    return {
        "stalled, in steps": _spread([saved["stalled"] / step for saved, step in pairs]),
        "slower, in steps": _spread([saved["seconds"] / step - window for saved, step in pairs]),
        "complete after, in steps": _spread([saved["complete"] / step for saved, step in pairs]),
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def _table(result: dict[str, Any]) -> str:
    def line(name: str, spread: dict[str, float], scale: float = 1.0, unit: str = "") -> str:
        values = [spread[key] * scale for key in ("median", "least", "greatest")]
        return f"{name:44}{values[0]:8.2f}{unit}   ({values[1]:.2f} .. {values[2]:.2f})"

    return "\n".join(
        [
            f"commit {result['commit']}, {result['machine']}, {result['rounds']} windows of {result['window']} steps, "
            f"{result['bytes'] / 1e6:.1f} MB a checkpoint",
            line("step", result["step seconds"], 1e3, " ms"),
            *(
                line(f"{kind}: {name}", spread)
                for kind in KINDS[1:]
                for name, spread in result[kind].items()
            ),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
