"""Measure a training step without a teacher, one with an online teacher, and the teacher alone."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kd.config import ModelSection, RunConfig
from megatron_kd.config.sections import TeacherParallelSection, TeacherSection
from megatron_kd.data.preparation.token_file_writer import TokenFileWriter
from megatron_kd.data.token_files import optimal_dtype
from megatron_kd.parallel.world import world_from_environment

from .harness import (
    add_device,
    bench_parser,
    device_name,
    paired_ratios,
    provenance,
    spread,
    time_rounds,
)


def size_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the sizes of student, teacher and batch."""
    parser = bench_parser(
        description, rounds=9, rounds_help="measured rounds; one more comes first, not counted"
    )
    add_device(parser)
    add = parser.add_argument
    add("--precision", choices=["fp32", "bf16"], default="fp32")
    add("--hidden", type=int, default=256, help="width of the student")
    add("--layers", type=int, default=4, help="layers of the student")
    add("--teacher-hidden", type=int, default=384)
    add("--teacher-layers", type=int, default=6)
    add("--vocab", type=int, default=8192, help="true vocabulary size")
    add("--sequence", type=int, default=256, help="tokens per sequence")
    add("--batch", type=int, default=16, help="sequences per step")
    add("--micro-batch", type=int, default=4, help="sequences per microbatch")
    add("--top-k", type=int, default=64)
    add(
        "--teacher-micro-batch",
        type=int,
        help="sequences per microbatch of the teacher (the student's)",
    )
    return parser


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Build a student with and without a teacher, and time both steps and the teacher in turn.

    Collectives:
        Over the world.
    """
    import torch
    import torch.distributed as dist

    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.train.build import build_run
    from megatron_kd.train.step import train_step

    with shared_folder(arguments) as folder:
        save_random_teacher(arguments, folder)
        layout = {"tensor": arguments.tensor, "pipeline": arguments.pipeline}
        online = run_config(arguments, folder, "online", **layout).model_copy(
            update={"teacher": teacher_section(arguments, folder)}
        )
        plain_run = build_run(run_config(arguments, folder, "plain", **layout))
        online_run = build_run(online)
        on_gpu = plain_run.groups.platform.is_cuda
        tasks: dict[str, Callable[[], object]] = {
            "plain": lambda: train_step(plain_run),
            "online": lambda: train_step(online_run),
            "teacher": teacher_forward(online_run),
        }
        seconds = time_rounds(
            tasks,
            arguments.rounds,
            barrier=dist.barrier,
            synchronize=torch.cuda.synchronize if on_gpu else lambda: None,
        )
        stop_groups()
    plain, with_teacher, teacher = seconds["plain"], seconds["online"], seconds["teacher"]
    return {
        "settings": vars(arguments),
        "device": device_name(on_gpu),
        **provenance("torch"),
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "online / (plain + teacher)": spread(paired_ratios(with_teacher, plain, teacher)),
        "online / plain": spread(paired_ratios(with_teacher, plain)),
    }


@contextmanager
def shared_folder(arguments: argparse.Namespace) -> Iterator[Path]:
    """Make a temporary folder with random tokens, the same one on every rank.

    Collectives:
        Over the world.
    """
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


def teacher_forward(run: Any) -> Callable[[], None]:
    """Return a function that runs the teacher's layers and logits on this rank's share of a step.

    Nothing is made of the logits, and no prefetch is involved.
    """
    local_teacher, share = run.teacher.local_work(run.train_data.microbatches(0))
    return lambda: _bare_forward(local_teacher, share)


def _bare_forward(teacher: Any, microbatches: Any) -> None:
    """Run a teacher whose targets are replaced by its logits, chunk by chunk."""
    import torch

    from megatron_kd.head.output_weight import linear_logits
    from megatron_kd.head.sizes import chunk_size
    from megatron_kd.head.token_chunks import TokenChunks
    from megatron_kd.parallel.vocab_shards import vocab_shard

    groups, make_target = teacher.groups, teacher.make_target

    def only_logits(hidden: Any, weight: Any, token_keys: Any) -> None:
        shard = vocab_shard(
            weight.shape[0],
            rank=groups.tensor_rank,
            size=groups.tensor_size,
            vocab_size=make_target.vocab_size,
        )
        states = hidden.reshape(-1, hidden.shape[-1])
        slices = groups.tensor_size if teacher.config.sequence_parallel else 1
        tokens = len(states) * slices
        size = chunk_size(make_target.chunk_tokens, shard.share, tokens, on_cuda=states.is_cuda)
        chunks = TokenChunks(tokens, slices, size)
        for _ in linear_logits(states, weight, shard, chunks, groups.tp):
            pass

    teacher.make_target = only_logits
    try:
        with torch.no_grad():
            teacher.targets(microbatches)
    finally:
        teacher.make_target = make_target


def teacher_section(arguments: argparse.Namespace, folder: Path) -> TeacherSection:
    """Return the section of the teacher in `folder`, in the layout of the options."""
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
    """Return the teacher's model section."""
    width = arguments.teacher_hidden
    shape = {
        "hidden_size": width,
        "num_layers": arguments.teacher_layers,
        "ffn_hidden_size": 3 * width,
        "num_attention_heads": width // 32,
    }
    return student.model_copy(update=shape)


def save_random_teacher(arguments: argparse.Namespace, folder: Path) -> None:
    """Save an untrained teacher in `folder`: its weights cost as much as trained ones.

    Collectives:
        Over the world.
    """
    from megatron_kd.train.build import build_run

    plain = run_config(arguments, folder, "plain")
    run = plain.run.model_copy(update={"directory": folder / "teacher"})
    teacher = plain.model_copy(update={"model": teacher_shape(arguments, plain.model), "run": run})
    build_run(teacher).save()


def run_config(arguments: argparse.Namespace, folder: Path, kind: str, **layout: int) -> RunConfig:
    """Return the run file of one kind of run.

    Args:
        arguments: The sizes.
        folder: Folder of the token files and runs.
        kind: "plain" or "online"; names the token file and the run.
        layout: Keys of [parallel].
    """
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
    """Write random tokens for every measured step."""
    count = (arguments.rounds + 2) * arguments.batch * arguments.sequence + 1
    ids = np.random.default_rng(0).integers(0, arguments.vocab, count)
    with TokenFileWriter(prefix, optimal_dtype(arguments.vocab)) as writer:
        writer.add(ids.astype(writer.dtype), np.array([count], dtype=np.int32))
        writer.commit(tokenizer_digest=None, vocab_size=arguments.vocab)
    Path(f"{prefix}.json").unlink()
