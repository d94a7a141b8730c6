"""Measure a trained model: loss and calibration on token files in any layout, or tasks of lm-evaluation-harness on an exported model.

    python tools/evaluate.py perplexity runs/student                                           # the run's own data.valid
    torchrun --nproc-per-node 4 tools/evaluate.py perplexity runs/student --data code=data/code --tensor 2 --pipeline 2 --json out.json
    python tools/evaluate.py perplexity runs/student --data in=data/valid --data out=data/code --teacher runs/teacher
    python tools/evaluate.py tasks exported/student --task examples/evaluation/piqa.yaml --data-folder eval/ --json out.json

perplexity reports, for each set, cross-entropy (nats per token), bits per byte where the file's description counts bytes, accuracy of the
likeliest id, and the expected calibration error of its probability (15 bins of equal width; adaptive: with equally many tokens). With
--teacher also KL(teacher || model), how often both find the same id likeliest, and the teacher's own cross-entropy.

tasks takes a Hugging Face folder (tools/convert_checkpoint.py to-huggingface) and task files with local data: nothing is downloaded, and no
code of a model or a task file is run. It needs lm-eval: pip install 'megatron-kd[evaluate]'. Results are printed as a table and, with
--json, written with what they were measured on.

Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

from megatron_kd.config import ConfigError
from megatron_kd.parallel.world import world_from_environment


def main(argv: list[str] | None = None) -> int:
    """Parse and measure."""
    arguments = _parser().parse_args(argv)
    try:
        found = arguments.run(arguments)
        if world_from_environment()[0] == 0:
            _report(found, arguments.json)
        return 0
    except ConfigError as error:
        print(f"evaluate: error: {error}", file=sys.stderr, flush=True)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    perplexity = commands.add_parser(
        "perplexity", help="cross-entropy and perplexity on token files"
    )
    perplexity.add_argument(
        "checkpoint", type=Path, help="run directory, its checkpoints folder, or one step-* folder"
    )
    perplexity.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="NAME=PREFIX",
        help="token file; may be repeated (the run's own)",
    )
    perplexity.add_argument(
        "--teacher",
        type=Path,
        metavar="CHECKPOINT",
        help="a model of the same vocabulary to compare with",
    )
    perplexity.add_argument(
        "--tokenizer",
        type=Path,
        help="the model's tokenizer, to compare with the one the data was made with",
    )
    perplexity.add_argument(
        "--sequence-length", type=int, help="tokens per sequence (the run's own)"
    )
    perplexity.add_argument(
        "--batch-size", type=int, default=8, help="sequences of one forward pass (8)"
    )
    perplexity.add_argument(
        "--max-sequences", type=int, help="measure no more than this many of each set"
    )
    perplexity.add_argument("--tensor", type=int, default=1, help="tensor-parallel size (1)")
    perplexity.add_argument("--pipeline", type=int, default=1, help="pipeline-parallel size (1)")
    perplexity.add_argument(
        "--precision",
        choices=["bf16", "fp32"],
        help="type of weights and activations (that of the checkpoint)",
    )
    perplexity.add_argument(
        "--device",
        choices=["auto", "cuda", "cpu"],
        default="auto",
        help="auto takes CUDA where there is one",
    )
    perplexity.set_defaults(run=_perplexity)
    tasks = commands.add_parser("tasks", help="tasks of lm-evaluation-harness")
    tasks.add_argument(
        "model", type=Path, help="Hugging Face folder of the exported model, with its tokenizer"
    )
    tasks.add_argument(
        "--task",
        action="append",
        required=True,
        type=Path,
        help="task file (YAML, as in examples/evaluation); may be repeated",
    )
    tasks.add_argument(
        "--data-folder",
        type=Path,
        default=Path(),
        help="where the task files' data is (the working directory)",
    )
    tasks.add_argument("--limit", type=int, help="no more than this many items of each task")
    tasks.add_argument("--batch-size", type=int, default=8, help="requests of one forward pass (8)")
    tasks.add_argument(
        "--max-length",
        type=int,
        help="tokens of the longest input, older ones are cut off (what config.json says)",
    )
    tasks.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    tasks.set_defaults(run=_tasks)
    for command in (perplexity, tasks):
        command.add_argument("--json", type=Path, help="write the results to this file")
    return parser


def _perplexity(arguments: argparse.Namespace) -> dict[str, Any]:
    from megatron_kd.checkpoint.store import find_checkpoint, read_info
    from megatron_kd.parallel.platform import start_platform

    folder = find_checkpoint(arguments.checkpoint, what="checkpoint")
    info = read_info(folder, what="checkpoint")
    run = _run_file(folder)
    teacher = (
        None if arguments.teacher is None else find_checkpoint(arguments.teacher, what="--teacher")
    )
    taught = None if teacher is None else read_info(teacher, what="--teacher")
    data, length = (
        _data(arguments.data, run),
        arguments.sequence_length or run.get("batch", {}).get("sequence_length"),
    )
    if not data or length is None:
        raise ConfigError(
            "--data NAME=PREFIX and --sequence-length are needed: the checkpoint is not in a run directory that says them"
        )
    _check_data(data, length, info, arguments)
    if taught is not None:
        _check_teacher(taught, info, length)
    _, world_size, local_rank = world_from_environment()
    platform = start_platform(arguments.device, local_rank)
    from megatron_kd.inference.frozen_model import FrozenModel, inference_layout
    from megatron_kd.inference.perplexity import measure
    from megatron_kd.parallel.groups import start_groups, stop_groups

    layout = inference_layout(
        info, tensor=arguments.tensor, pipeline=arguments.pipeline, world_size=world_size
    )
    if taught is not None:
        inference_layout(
            taught, tensor=arguments.tensor, pipeline=arguments.pipeline, world_size=world_size
        )
    precision = arguments.precision or info.precision
    found = {}
    try:
        groups = start_groups(platform, layout, timeout_seconds=600)
        built = {"precision": precision, "sequence_length": length}
        model = FrozenModel(folder, info, groups, layout, **built)
        beside = (
            None
            if teacher is None or taught is None
            else FrozenModel(teacher, taught, groups, layout, **built)
        )
        options = {
            "sequence_length": length,
            "batch_size": arguments.batch_size,
            "max_sequences": arguments.max_sequences,
        }
        for name, prefix in data.items():
            result = measure(
                model,
                prefix,
                name,
                index_cache=folder.parent.parent / "index_cache",
                teacher=beside,
                **options,
            )
            found[name] = result.describe(prefix)
    finally:
        stop_groups()
    named = {
        "checkpoint": str(folder),
        "step": info.step,
        **({} if teacher is None else {"teacher": str(teacher)}),
    }
    return {**named, "sequence_length": length, "precision": precision, "results": found}


def _check_teacher(taught: Any, info: Any, length: int) -> None:
    """Both models know the same ids, and the teacher sequences of this length."""
    if taught.vocab_size != info.vocab_size or (
        None not in (taught.tokenizer, info.tokenizer) and taught.tokenizer != info.tokenizer
    ):
        raise ConfigError(
            f"--teacher has another vocabulary ({taught.vocab_size} ids, tokenizer {taught.tokenizer}) than the model "
            f"({info.vocab_size} ids, tokenizer {info.tokenizer}): their distributions cannot be compared"
        )
    window = taught.model_section().window_problem(length)
    if window is not None:
        raise ConfigError(f"--teacher: --sequence-length {window}")


def _run_file(folder: Path) -> dict[str, Any]:
    path = folder.parent.parent / "config.toml"
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _data(given: list[str], run: dict[str, Any]) -> dict[str, str]:
    found = {}
    for text in given:
        name, equals, prefix = text.partition("=")
        if not (name and equals and prefix):
            raise ConfigError(f"--data {text} must be NAME=PREFIX, such as heldout=data/heldout")
        found[name] = prefix
    return found or dict(run.get("data", {}).get("valid", {}))


def _check_data(
    data: dict[str, str], length: int, info: Any, arguments: argparse.Namespace
) -> None:
    """Each file exists, is whole, has ids of the model's vocabulary and at least one sequence; no collective."""
    from megatron_kd.data.token_file_checks import check_token_file
    from megatron_kd.data.token_files import read_index
    from megatron_kd.data.tokenizer import load_tokenizer

    digest = info.tokenizer
    if arguments.tokenizer is not None:
        given = load_tokenizer(arguments.tokenizer)[1].digest
        if digest is not None and given != digest:
            raise ConfigError(
                f"--tokenizer {arguments.tokenizer} is not the one the model was trained with (digests {given} and {digest})"
            )
        digest = given
    window = info.model_section().window_problem(length)
    if window is not None:
        raise ConfigError(f"--sequence-length {window}")
    for option, value in (
        ("--sequence-length", length),
        ("--batch-size", arguments.batch_size),
        ("--max-sequences", arguments.max_sequences),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{option} ({value}) must be at least 1")
    for prefix in data.values():
        check_token_file(prefix, vocab_size=info.vocab_size, tokenizer_digest=digest)
        if read_index(prefix).num_tokens < length + 1:
            raise ConfigError(
                f"{prefix} holds {read_index(prefix).num_tokens} tokens, fewer than one sequence of {length + 1}"
            )


def _tasks(arguments: argparse.Namespace) -> dict[str, Any]:
    from megatron_kd.inference.lm_eval import read_task, run_tasks

    tasks = [read_task(path, arguments.data_folder) for path in arguments.task]
    results = run_tasks(
        arguments.model,
        tasks,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        device=arguments.device,
        max_length=arguments.max_length,
    )
    return {"model": str(arguments.model), "limit": arguments.limit, "results": results}


def _report(found: dict[str, Any], path: Path | None) -> None:
    """A table on standard output, and the whole as JSON in `path`."""
    if path is not None:
        from megatron_kd.storage.atomic_files import write_atomically

        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(found, indent=2) + "\n").encode())
    width = max(map(len, found["results"]))
    for name, metrics in found["results"].items():
        numbers = (
            f"{key} {value:,}" if isinstance(value, int) else f"{key} {value:.4f}"
            for key, value in metrics.items()
            if key != "data"
        )
        print(f"{name:{width}}  {'  '.join(numbers)}")


if __name__ == "__main__":
    sys.exit(main())
