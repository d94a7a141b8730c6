"""Time what a checkpoint costs the training, saved while the training waits, or asynchronously.

    torchrun --nproc-per-node 2 tools/bench_save.py --config examples/quickstart/student.toml
        --run.directory /tmp/bench
    ... --teacher.source online --teacher.checkpoint runs/quickstart/teacher   # a distilled student

Windows of steps without a save, with a save that is waited for, and with an asynchronous save take
turns. A save begins before the first step of a window and is polled after each step, as in
training. "stalled" is how long the training stood still for it. "slower" is how much longer the
window took than one without a save; it includes what the writing takes from the cores. Both are in
steps, formed within one round. The checkpoints go to checkpoints-* in run.directory, which must not
hold a run.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from typing import Any

from bench.harness import (
    Spread,
    add_run_file,
    add_threads,
    bench_parser,
    provenance,
    run_benchmark,
    spread,
)

from megatron_kd.config import ConfigError, RunConfig, load_config
from megatron_kd.parallel.world import world_from_environment

KINDS = ("none", "waited for", "asynchronous")
Window = dict[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; rank 0 prints."""
    arguments, overrides = _parser().parse_known_args(argv)
    rank, _, local_rank = world_from_environment()

    def load_and_measure() -> dict[str, Any]:
        if min(arguments.rounds, arguments.window) < 2:
            raise ConfigError("--rounds and --window must be at least 2")
        steps = len(KINDS) * (2 + arguments.rounds * arguments.window)
        fixed = ["--train.steps", str(steps), "--checkpoint.resume", "false"]
        config = load_config(["--config", arguments.config, *overrides, *fixed])
        from megatron_kd.parallel.platform import start_platform

        start_platform(config.train.device, local_rank)
        return measure(config, arguments)

    return run_benchmark("bench_save", arguments, load_and_measure, _table, rank=rank)


def _parser() -> argparse.ArgumentParser:
    parser = bench_parser(__doc__, rounds=9, rounds_help="windows of each kind")
    add_run_file(parser)
    parser.add_argument("--window", type=int, default=12, help="steps of a window")
    add_threads(parser)
    return parser


def measure(config: RunConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time windows of all kinds, in turn.

    Collectives:
        Over the world.
    """
    import torch

    from megatron_kd.parallel.groups import stop_groups

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    runs = _runs(config)
    windows: dict[str, list[Window]] = {kind: [] for kind in KINDS}
    for number in range(arguments.rounds + 1):
        for kind in KINDS:
            steps = 2 if number == 0 else arguments.window
            window = _window(runs[kind], steps, save=kind != "none")
            if number:
                windows[kind].append(window)
    for kind in KINDS[1:]:
        runs[kind].saver.verifier.close()
    threads, world = torch.get_num_threads(), runs["none"].groups.world_size
    stop_groups()
    newest = max(runs["asynchronous"].saver.checkpoints.glob("step-*"))
    return {
        **provenance("torch"),
        "machine": f"{platform.machine()}, {world} ranks, {threads} threads a rank",
        "rounds": arguments.rounds,
        "window": arguments.window,
        "step seconds": spread(
            [window["seconds"] / arguments.window for window in windows["none"]]
        ),
        "bytes": sum(path.stat().st_size for path in newest.iterdir()),
        **{kind: _in_steps(windows, kind, arguments.window) for kind in KINDS[1:]},
    }


def _runs(config: RunConfig) -> dict[str, Any]:
    """Return one run with a saver of its own for each kind."""
    from dataclasses import replace

    from megatron_kd.checkpoint.saver import Saver
    from megatron_kd.train.build import build_run

    run = build_run(config)
    runs = {KINDS[0]: run}
    for kind in KINDS[1:]:
        section = config.checkpoint.model_copy(update={"asynchronous": kind == "asynchronous"})
        folder = config.run.directory / f"checkpoints-{kind.replace(' ', '-')}" / "checkpoints"
        device, watchdog = run.groups.platform.device, run.groups.watchdog
        saver = Saver(folder, section, device=device, watchdog=watchdog)
        runs[kind] = replace(run, saver=saver)
    return runs


def _window(run: Any, steps: int, *, save: bool) -> Window:
    """Return the seconds of a window, of its stalls, and until its save was complete."""
    import torch.distributed as dist

    from megatron_kd.parallel.groups import seed_step
    from megatron_kd.train.step import train_step

    dist.barrier()
    start = time.perf_counter()
    if save:
        run.save()
    stalled, complete = time.perf_counter() - start, 0.0
    for _ in range(steps):
        seed_step(run.config.train.seed, run.progress.step, run.groups)
        train_step(run)
        poll_start = time.perf_counter()
        is_saving = run.saver.poll()
        stalled += time.perf_counter() - poll_start
        if not is_saving and not complete:
            complete = time.perf_counter() - start
    seconds = time.perf_counter() - start
    # Not part of the window: the next one must begin without a pending save.
    run.saver.finish()
    return {
        "seconds": seconds,
        "stalled": stalled,
        "complete": complete or time.perf_counter() - start,
    }


def _in_steps(windows: dict[str, list[Window]], kind: str, window: int) -> dict[str, Spread]:
    pairs = [
        (saved, plain["seconds"] / window)
        for saved, plain in zip(windows[kind], windows["none"], strict=True)
    ]
    return {
        "stalled, in steps": spread([saved["stalled"] / step for saved, step in pairs]),
        "slower, in steps": spread([saved["seconds"] / step - window for saved, step in pairs]),
        "complete after, in steps": spread([saved["complete"] / step for saved, step in pairs]),
    }


def _table(result: dict[str, Any]) -> str:
    def line(name: str, values: Spread, scale: float = 1.0, unit: str = "") -> str:
        middle, low, high = (values[key] * scale for key in ("median", "min", "max"))
        return f"{name:44}{middle:8.2f}{unit}   ({low:.2f} .. {high:.2f})"

    size = f"{result['bytes'] / 1e6:.1f} MB a checkpoint"
    return "\n".join(
        [
            f"commit {result['commit']}, {result['machine']}, "
            f"{result['rounds']} windows of {result['window']} steps, {size}",
            line("step", result["step seconds"], 1e3, " ms"),
            *(
                line(f"{kind}: {name}", values)
                for kind in KINDS[1:]
                for name, values in result[kind].items()
            ),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
