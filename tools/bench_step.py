"""Time of one training step: language-model loss only, with an online teacher, and the teacher's forward alone.

    python tools/bench_step.py                                         # one process, CPU or GPU
    torchrun --nproc-per-node 2 tools/bench_step.py --tensor 2         # any layout
    torchrun --nproc-per-node 2 tools/bench_step.py --teacher-tensor 2 # the teacher in another one

All three are measured in one process, in turn, round after round, so that a slow moment of the machine hits each alike; the
ratio is formed within a round. An online step should cost no more than a plain step and a bare teacher forward together: what
is above 1 is the price of choosing targets and of the distillation loss.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kd.config import ConfigError, ModelSection, RunConfig
from megatron_kd.config.sections import TeacherParallelSection, TeacherSection
from megatron_kd.data.preparation.token_file_writer import TokenFileWriter
from megatron_kd.data.token_files import optimal_dtype
from megatron_kd.parallel.world import world_from_environment
from megatron_kd.storage.provenance import commit


def main() -> int:
    """Run the benchmark; rank 0 prints a table, or JSON."""
    arguments = _parser().parse_args()
    rank, _, local_rank = world_from_environment()
    from megatron_kd.parallel.platform import start_platform

    try:
        start_platform(arguments.device, local_rank)
        result = measure(arguments)
    except ConfigError as error:
        print(f"bench_step: error: {error}", file=sys.stderr)
        return 2
    if rank == 0:
        if arguments.output:
            Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(result, indent=2) if arguments.json else _table(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    options = parser(__doc__)
    options.add_argument("--tensor", type=int, default=1, help="tensor-parallel size")
    options.add_argument("--pipeline", type=int, default=1, help="pipeline-parallel size")
    options.add_argument(
        "--teacher-tensor", type=int, help="tensor-parallel size of the teacher (the student's)"
    )
    options.add_argument(
        "--teacher-pipeline", type=int, help="pipeline-parallel size of the teacher (the student's)"
    )
    return options


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options about sizes, rounds and output."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument(
        "--rounds",
        type=int,
        default=9,
        help="measured rounds; one more comes first and is not counted",
    )
    parser.add_argument("--hidden", type=int, default=256, help="width of the student")
    parser.add_argument("--layers", type=int, default=4, help="layers of the student")
    parser.add_argument("--teacher-hidden", type=int, default=384)
    parser.add_argument("--teacher-layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=8192, help="true vocabulary size")
    parser.add_argument("--sequence", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences per microbatch")
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument(
        "--teacher-micro-batch",
        type=int,
        help="sequences per microbatch of the teacher (the student's)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", help="also write JSON to this file")
    return parser


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Build a student with and without a teacher once, and time the three in turn. Collective over the world."""
    import torch
    import torch.distributed as dist

    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.train.build import build_run
    from megatron_kd.train.step import train_step

    with shared_folder(arguments) as folder:
        save_random_teacher(arguments, folder)
        online, plain = (
            run_config(
                arguments, folder, kind, tensor=arguments.tensor, pipeline=arguments.pipeline
            )
            for kind in ("online", "plain")
        )
        online = online.model_copy(update={"teacher": teacher_section(arguments, folder)})
        runs = {"plain": build_run(plain), "online": build_run(online)}
        device = runs["plain"].groups.platform.device

        teacher, microbatches = runs["online"].teacher, runs["online"].train_data.microbatches(0)
        alone, share = teacher.local_work(microbatches)
        tasks: dict[str, Callable[[], object]] = {
            "plain": lambda: train_step(runs["plain"]),
            "online": lambda: train_step(runs["online"]),
            "teacher": lambda: bare_forward(alone, share),
        }
        times: dict[str, list[float]] = {name: [] for name in tasks}
        for counted in [False] + [True] * arguments.rounds:
            for name, task in tasks.items():
                dist.barrier()
                begin = time.perf_counter()
                task()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if counted:
                    times[name].append(time.perf_counter() - begin)
        stop_groups()
    return _result(arguments, times, str(device))


@contextmanager
def shared_folder(arguments: argparse.Namespace) -> Iterator[Path]:
    """A temporary folder with random tokens, the same one on every rank. Collective over the world."""
    from megatron_kd.config import ParallelSection
    from megatron_kd.parallel.collectives import from_rank_zero
    from megatron_kd.parallel.groups import start_groups
    from megatron_kd.parallel.platform import start_platform

    rank, _, local_rank = world_from_environment()
    start_groups(
        start_platform(arguments.device, local_rank), ParallelSection(), timeout_seconds=600
    )
    folder = Path(from_rank_zero(tempfile.mkdtemp))
    try:
        from_rank_zero(
            lambda: [_write_tokens(arguments, folder / kind) for kind in ("online", "plain")]
        )
        yield folder
    finally:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def bare_forward(teacher: Any, microbatches: Any) -> None:
    """The teacher's layers and its logits, chunk by chunk, and nothing made of them."""
    import torch

    from megatron_kd.head.output_weight import linear_logits
    from megatron_kd.head.sizes import chunk_size
    from megatron_kd.head.token_chunks import TokenChunks
    from megatron_kd.parallel.vocab_shards import vocab_shard

    groups, chosen = teacher.groups, teacher.make_target

    def only_logits(hidden: Any, weight: Any, token_keys: Any) -> None:
        shard = vocab_shard(
            weight.shape[0],
            rank=groups.tensor_rank,
            size=groups.tensor_size,
            vocab_size=chosen.vocab_size,
        )
        states = hidden.reshape(-1, hidden.shape[-1])
        slices = groups.tensor_size if teacher.config.sequence_parallel else 1
        tokens = len(states) * slices
        chunks = TokenChunks(
            tokens,
            slices,
            chunk_size(chosen.chunk_tokens, shard.share, tokens, on_cuda=states.is_cuda),
        )
        for _ in linear_logits(states, weight, shard, chunks, groups.tp):
            pass

    teacher.make_target = only_logits
    try:
        with torch.no_grad():
            teacher.targets(microbatches)
    finally:
        teacher.make_target = chosen


def teacher_section(arguments: argparse.Namespace, folder: Path) -> TeacherSection:
    """The teacher in `folder`, laid out as asked for."""
    return TeacherSection(
        source="online",
        checkpoint=folder / "teacher",
        parallel=TeacherParallelSection(
            tensor=arguments.teacher_tensor, pipeline=arguments.teacher_pipeline
        ),
        micro_batch_size=arguments.teacher_micro_batch,
        overlap="none",
    )


def teacher_shape(arguments: argparse.Namespace, student: ModelSection) -> ModelSection:
    """The teacher's model section."""
    width = arguments.teacher_hidden
    shape = {
        "hidden_size": width,
        "num_layers": arguments.teacher_layers,
        "ffn_hidden_size": 3 * width,
        "num_attention_heads": width // 32,
    }
    return student.model_copy(update=shape)


def save_random_teacher(arguments: argparse.Namespace, folder: Path) -> None:
    """An untrained teacher's checkpoint in `folder`: its weights cost as much as trained ones. Collective over the world."""
    from megatron_kd.train.build import build_run

    plain = run_config(arguments, folder, "plain")
    run = plain.run.model_copy(update={"directory": folder / "teacher"})
    teacher = plain.model_copy(update={"model": teacher_shape(arguments, plain.model), "run": run})
    build_run(teacher).save()


def run_config(arguments: argparse.Namespace, folder: Path, kind: str, **layout: int) -> RunConfig:
    """The run file of one kind of run, "plain" or "online", with layout's sizes."""
    content: dict[str, Any] = {
        "model": {
            "hidden_size": arguments.hidden,
            "num_layers": arguments.layers,
            "num_attention_heads": arguments.hidden // 32,
            "ffn_hidden_size": 3 * arguments.hidden,
            "vocab_size": arguments.vocab,
        },
        "data": {"train": [str(folder / kind)], "index_cache": str(folder / "cache")},
        "batch": {
            "global_batch_size": arguments.batch,
            "micro_batch_size": arguments.micro_batch,
            "sequence_length": arguments.sequence,
        },
        "optimizer": {"learning_rate": 1e-4, "schedule": "constant"},
        "parallel": layout,
        "train": {
            "steps": arguments.rounds + 2,
            "precision": arguments.precision,
            "device": arguments.device,
        },
        "distill": {"alpha": 0.9, "top_k": arguments.top_k, "tail": "bucket"},
        "run": {"directory": str(folder / f"run-{kind}")},
    }
    return RunConfig.model_validate(content)


def _write_tokens(arguments: argparse.Namespace, prefix: Path) -> None:
    """Random tokens for every measured step."""
    count = (arguments.rounds + 2) * arguments.batch * arguments.sequence + 1
    ids = np.random.default_rng(0).integers(0, arguments.vocab, count)
    with TokenFileWriter(prefix, optimal_dtype(arguments.vocab)) as writer:
        writer.add(ids.astype(writer.dtype), np.array([count], dtype=np.int32))
        writer.commit(tokenizer_digest=None, vocab_size=arguments.vocab)
    Path(f"{prefix}.json").unlink()


def _result(
    arguments: argparse.Namespace, times: dict[str, list[float]], device: str
) -> dict[str, Any]:
    import torch

    ratios = [
        online / (plain + teacher)
        for plain, online, teacher in zip(
            times["plain"], times["online"], times["teacher"], strict=True
        )
    ]
    return {
        "settings": vars(arguments),
        "device": torch.cuda.get_device_name()
        if device.startswith("cuda")
        else f"CPU {platform.machine()}, {torch.get_num_threads()} threads a rank",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit(),
        "seconds": {name: spread(values) for name, values in times.items()},
        "online / (plain + teacher)": spread(ratios),
        "online / plain": spread(
            [a / b for a, b in zip(times["online"], times["plain"], strict=True)]
        ),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _table(result: dict[str, Any]) -> str:
    names = {
        "plain": "step, language-model loss only",
        "teacher": "bare teacher forward",
        "online": "step with the online teacher",
    }
    lines = [
        f"{result['device']}, torch {result['versions']['torch']}, commit {result['commit']}",
        "",
    ]
    for name, title in names.items():
        spread = result["seconds"][name]
        lines.append(
            f"{title:34} {spread['median'] * 1e3:9.1f} ms   ({spread['min'] * 1e3:.1f} .. {spread['max'] * 1e3:.1f})"
        )
    for name in ("online / (plain + teacher)", "online / plain"):
        spread = result[name]
        lines.append(
            f"{name:34} {spread['median']:9.3f}      ({spread['min']:.3f} .. {spread['max']:.3f})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
