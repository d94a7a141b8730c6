r"""Measure a trained model: loss and calibration on token files, or tasks of lm-evaluation-harness.

    python tools/evaluate.py perplexity runs/student                     # the run's data.valid
    torchrun --nproc-per-node 4 tools/evaluate.py perplexity runs/student --data code=data/code \
        --tensor 2 --pipeline 2 --json out.json
    python tools/evaluate.py perplexity runs/student --data in=data/valid --data out=data/code \
        --teacher runs/teacher
    python tools/evaluate.py tasks exported/student --task examples/evaluation/piqa.yaml \
        --data-folder eval/ --json out.json

perplexity runs in any layout. It reports for each set: cross-entropy (nats per token), bits per
byte if the file's description counts bytes, accuracy of the most probable id, and the expected
calibration error of its probability (15 bins of equal width; adaptive: with equally many tokens).
With --teacher it adds KL(teacher || model), the share of tokens with the same most probable id in
both models, and the teacher's cross-entropy.

tasks takes a Hugging Face folder (tools/convert_checkpoint.py to-huggingface) and task files with
local data. Nothing is downloaded, and no code of a model or a task file is run. It needs lm-eval:
pip install 'megatron-kd[evaluate]'.

Results are printed as a table. --json also writes them to a file, with what they were measured on.

Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_kd.config import ConfigError
from megatron_kd.parallel.world import world_from_environment
from megatron_kd.storage.exit_codes import BAD_INPUT, FINISHED

if TYPE_CHECKING:
    from megatron_kd.inference.perplexity_inputs import PerplexityInputs
    from megatron_kd.parallel.platform import Platform


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        report = arguments.run(arguments)
        if world_from_environment()[0] == 0:
            _report(report, arguments.json)
        return FINISHED
    except ConfigError as error:
        print(f"evaluate: error: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    perplexity = commands.add_parser(
        "perplexity", help="cross-entropy and perplexity on token files"
    )
    _add_perplexity_options(perplexity)
    tasks = commands.add_parser("tasks", help="tasks of lm-evaluation-harness")
    _add_task_options(tasks)
    for command in (perplexity, tasks):
        command.add_argument("--json", type=Path, help="write the results to this file")
    return parser


def _add_perplexity_options(perplexity: argparse.ArgumentParser) -> None:
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


def _add_task_options(tasks: argparse.ArgumentParser) -> None:
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


def _perplexity(arguments: argparse.Namespace) -> dict[str, Any]:
    from megatron_kd.inference.perplexity_inputs import find_perplexity_inputs
    from megatron_kd.parallel.platform import start_platform

    for option, value in (
        ("--batch-size", arguments.batch_size),
        ("--max-sequences", arguments.max_sequences),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{option} ({value}) must be at least 1")
    inputs = find_perplexity_inputs(
        arguments.checkpoint,
        teacher=arguments.teacher,
        tokenizer=arguments.tokenizer,
        data=_named_prefixes(arguments.data),
        sequence_length=arguments.sequence_length,
    )
    precision = arguments.precision or inputs.info.precision
    # Before any other import of megatron-core: on a CPU it must be prepared first.
    platform = start_platform(arguments.device, world_from_environment()[2])
    from megatron_kd.parallel.groups import stop_groups

    try:
        results = _measure(arguments, inputs, platform, precision)
    finally:
        stop_groups()
    return {
        "checkpoint": str(inputs.folder),
        "step": inputs.info.step,
        **({} if inputs.teacher is None else {"teacher": str(inputs.teacher[0])}),
        "sequence_length": inputs.sequence_length,
        "precision": precision,
        "results": results,
    }


def _measure(
    arguments: argparse.Namespace, inputs: PerplexityInputs, platform: Platform, precision: str
) -> dict[str, Any]:
    """Load the models and measure each set. Collective over the world."""
    from megatron_kd.inference.frozen_model import FrozenModel, inference_layout
    from megatron_kd.inference.perplexity import HeldOutSet, measure
    from megatron_kd.parallel.groups import start_groups

    checkpoints = [(inputs.folder, inputs.info)]
    if inputs.teacher is not None:
        checkpoints.append(inputs.teacher)
    world_size, length = world_from_environment()[1], inputs.sequence_length
    sizes = {"tensor": arguments.tensor, "pipeline": arguments.pipeline}
    layout, *_ = [inference_layout(info, **sizes, world_size=world_size) for _, info in checkpoints]
    groups = start_groups(platform, layout, timeout_seconds=600)
    model, *teachers = [
        FrozenModel(folder, info, groups, layout, precision=precision, sequence_length=length)
        for folder, info in checkpoints
    ]
    index_cache = inputs.folder.parent.parent / "index_cache"
    results = {}
    for name, prefix in inputs.data.items():
        held_out = HeldOutSet(
            prefix, name, length, arguments.batch_size, index_cache, arguments.max_sequences
        )
        results[name] = measure(model, held_out, *teachers).describe(prefix)
    return results


def _named_prefixes(options: list[str]) -> dict[str, str]:
    """Return name -> prefix of the --data options."""
    prefixes = {}
    for option in options:
        name, equals, prefix = option.partition("=")
        if not (name and equals and prefix):
            raise ConfigError(f"--data {option} must be NAME=PREFIX, such as heldout=data/heldout")
        prefixes[name] = prefix
    return prefixes


def _tasks(arguments: argparse.Namespace) -> dict[str, Any]:
    from megatron_kd.inference.lm_eval import TaskOptions, read_task, run_tasks

    tasks = [read_task(path, arguments.data_folder) for path in arguments.task]
    options = TaskOptions(
        arguments.limit, arguments.batch_size, arguments.device, arguments.max_length
    )
    results = run_tasks(arguments.model, tasks, options)
    return {"model": str(arguments.model), "limit": arguments.limit, "results": results}


def _report(report: dict[str, Any], path: Path | None) -> None:
    """Print a table, and write the report as JSON to `path`."""
    if path is not None:
        from megatron_kd.storage.atomic_files import write_atomically

        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())
    width = max(map(len, report["results"]))
    for name, metrics in report["results"].items():
        numbers = (
            f"{key} {value:,}" if isinstance(value, int) else f"{key} {value:.4f}"
            for key, value in metrics.items()
            if key != "data"
        )
        print(f"{name:{width}}  {'  '.join(numbers)}")


if __name__ == "__main__":
    sys.exit(main())
