"""Check that a run can start on a number of ranks, and print what it will be.

    python tools/check_run.py --config run.toml --ranks 128 --parallel.tensor 4
    python tools/check_run.py --config run.toml --ranks 8 --extraction     # for
    tools/cache_teacher.py

It takes a second of one CPU, before a job takes its nodes. It checks what every rank checks at its
start: keys and values, sizes against ranks, tokenizer, token files, checkpoints. The plan is
printed to stderr, with the peak memory of a rank (planning/memory.py lists what is counted).
--print writes values of keys to stdout, one per line, empty if unset. A value with a newline is an
error.

Exit codes: 0 it could start, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from megatron_kd.config import ConfigError, RunConfig, load_config
from megatron_kd.storage.exit_codes import BAD_INPUT, FINISHED
from megatron_kd.train.startup.input_checks import Inputs, check_inputs

GIB = 2**30


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    arguments, rest = _parser().parse_known_args(argv)
    try:
        config = load_config(["--config", arguments.config, *rest])
        if arguments.extraction and not config.teacher.runs_in_job:
            config = load_config(
                ["--config", arguments.config, *rest, "--teacher.source", "online"]
            )
        values = [_value(config, key) for key in arguments.print]
        print(_describe_run(config, arguments.ranks), file=sys.stderr, flush=True)
        inputs = check_inputs(config, world_size=arguments.ranks)
        print(_describe_inputs(config, inputs, arguments.ranks), file=sys.stderr, flush=True)
    except ConfigError as error:
        print(f"check_run: error: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT
    for value in values:
        print(value)
    return FINISHED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        required=True,
        help="run file; its keys can be overridden as --section.key value",
    )
    parser.add_argument("--ranks", required=True, type=int, help="processes of the job")
    parser.add_argument(
        "--extraction", action="store_true", help="the run file is for tools/cache_teacher.py"
    )
    parser.add_argument(
        "--print", nargs="+", default=[], metavar="KEY", help="keys whose values go to stdout"
    )
    return parser


def _value(config: RunConfig, key: str) -> str:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name, None)
    text = "" if value is None else str(value)
    if not text.isprintable():
        raise ConfigError(
            f"{key} ({text!r}) has a newline or another control character, which no path of a job "
            "may have"
        )
    return text


def _describe_run(config: RunConfig, ranks: int) -> str:
    """Describe what follows from the run file only.

    Raises:
        ConfigError: The sizes do not divide.
    """
    if ranks < 1:
        raise ConfigError(f"--ranks ({ranks}) must be at least 1")
    model, parallel, batch, train = config.model, config.parallel, config.batch, config.train
    data, microbatches = config.data_parallel_size(ranks), config.num_microbatches(ranks)
    tokens = batch.global_batch_size * batch.sequence_length
    lines = [
        f"student    {model.preset or 'without preset'}: {model.num_layers} layers of width "
        f"{model.hidden_size}",
        f"layout     {ranks} ranks: tensor {parallel.tensor} x pipeline {parallel.pipeline} x data "
        f"{data}, {microbatches} microbatches",
        f"step       {batch.global_batch_size} sequences of {batch.sequence_length} tokens = "
        f"{tokens:,} tokens",
        f"run        {train.steps:,} steps = {train.steps * tokens / 1e9:,.4g}e9 tokens, a "
        f"checkpoint every {config.checkpoint.interval}",
        f"directory  {config.run.directory}",
    ]
    if config.teacher.uses_megatron:
        tensor, pipeline, _ = config.teacher_layout(ranks)
        lines.append(
            f"teacher    {config.teacher.source}, {config.teacher.checkpoint}: tensor {tensor} x "
            f"pipeline {pipeline}"
        )
    elif config.teacher.enabled:
        lines.append(
            f"teacher    {config.teacher.source}: "
            f"{config.teacher.cache or config.teacher.checkpoint}"
        )
    return "\n".join(lines)


def _describe_inputs(config: RunConfig, inputs: Inputs, ranks: int) -> str:
    """Describe what follows from the files: the first step and the peak memory."""
    from megatron_kd.planning.memory import peak_rank, run_memory
    from megatron_kd.planning.planned_run import PlannedRun

    step = inputs.resume[1].step if inputs.resume is not None else 0
    planned = PlannedRun(
        config,
        inputs.vocab_size,
        inputs.teacher.model,
        device="cpu" if config.train.device == "cpu" else "cuda",
    )
    rank = peak_rank(run_memory(planned, ranks))
    return (
        f"starts at  step {step:,}\n"
        f"memory     {rank.total / GIB:.1f} GiB on the rank with the most, without the framework's"
    )


if __name__ == "__main__":
    sys.exit(main())
