r"""Turn text into Megatron token files.

    python tools/preprocess_data.py --input corpus/ --pattern '*.txt' \
        --tokenizer tokenizer.model --output data/train --holdout valid=0.05
    python tools/preprocess_data.py --input 'shards/*.jsonl.zst' more.parquet \
        --tokenizer tokenizer.json --output data/train

writes data/train.{bin,idx,json} and, from documents chosen by a hash of their names,
data/valid.{bin,idx,json}. The bytes are those that Megatron's own tool writes for the same
documents in the same order, for any number of workers. Files appear under their names only when
everything is done. Until then finished pieces wait in data/train.pieces/, and the same command, run
again after any interruption, continues from them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_kd.data.preparation.command_line import (
    PieceProgress,
    check_outputs,
    parse_holdout,
    parse_option,
    parse_shard,
    run_and_report,
)
from megatron_kd.data.preparation.documents import FORMAT_CHOICES
from megatron_kd.data.preparation.jobs.execution import existing_output, make_output, make_share
from megatron_kd.data.preparation.jobs.job_plan import JobPlan
from megatron_kd.data.preparation.jobs.slurm_execution import SlurmOptions, submit
from megatron_kd.data.preparation.jobs.text_job import TextRequest, plan_text
from megatron_kd.data.vocabularies.patterns import PATTERNS

_EXIT_CODES = (
    "Exit codes: 0 done, 2 bad input, 5 no space left (finished pieces are kept), "
    "1 another failure, 130 interrupted."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, make the token files and print a summary."""
    parsed = parse_arguments(arguments)
    return run_and_report("preprocess_data", "documents", lambda: run(parsed))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make or submit the output and return the summary."""
    plan = plan_text(
        TextRequest(
            inputs=arguments.input,
            output=arguments.output,
            tokenizer=arguments.tokenizer,
            patterns=arguments.pattern,
            exclude=arguments.exclude,
            format=arguments.format,
            holdout=arguments.holdout,
            append_eod=arguments.append_eod,
            text_key=arguments.text_key,
            end_of_document=arguments.end_of_document,
            pattern=arguments.tiktoken_pattern,
            strict=arguments.strict,
        )
    )
    summary = existing_output(plan, overwrite=arguments.overwrite)
    if summary is not None:
        return summary
    if arguments.executor == "slurm":
        return submit_to_slurm(plan, arguments)
    progress = PieceProgress(plan.size)
    if arguments.shard is None:
        return make_output(plan, arguments.workers, progress.report) | progress.close()
    index, count = arguments.shard
    make_share(plan, arguments.shard, arguments.workers, progress.report)
    num_pieces = len(range(index, len(plan.pieces), count))
    return {"shard": f"{index}/{count}", "pieces": num_pieces, **progress.close()}


def submit_to_slurm(plan: JobPlan, arguments: argparse.Namespace) -> dict[str, Any]:
    """Submit the job and return its ids."""
    logs = arguments.slurm_logs or arguments.output.with_name(f"{arguments.output.name}.logs")
    options = SlurmOptions(
        tasks=arguments.tasks,
        partition=arguments.slurm_partition,
        time_limit=arguments.slurm_time,
        logs=logs,
        sbatch=dict(arguments.slurm_option),
    )
    return {"submitted": submit(plan, options), "logs": str(logs), "pieces": len(plan.pieces)}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        description="Turn text into Megatron token files (.bin/.idx) with a .json description "
        "beside them. Run the same command again after an interruption: finished pieces are kept.",
        epilog=_EXIT_CODES,
    )
    _add_input_options(parser)
    _add_tokenizer_options(parser)
    _add_output_options(parser)
    _add_execution_options(parser)
    parsed = parser.parse_args(arguments)
    check_outputs(parser, parsed.output, parsed.holdout)
    if parsed.workers < 1 or parsed.tasks < 1:
        parser.error("--workers and --tasks must be at least 1")
    if parsed.executor == "slurm" and not parsed.slurm_partition:
        parser.error("--executor slurm needs --slurm-partition")
    return parsed


def _add_input_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, folders or quoted globs: text (one document a file), .jsonl (one a line), "
        ".parquet (one a row); the first two also as .gz, .zst, .bz2, .xz (each read by one "
        "worker)",
    )
    parser.add_argument(
        "--pattern",
        nargs="+",
        default=["*"],
        metavar="GLOB",
        help="names of the files to take from folders (all)",
    )
    parser.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="GLOB",
        help="names of files and subfolders to leave out",
    )
    parser.add_argument(
        "--format",
        choices=FORMAT_CHOICES,
        default="auto",
        help="what the files hold (by their names)",
    )
    parser.add_argument(
        "--text-key",
        default="text",
        help="key or column of the text in .jsonl and .parquet (text)",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first document that cannot be read, in place of counting it",
    )


def _add_tokenizer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="PATH",
        help="SentencePiece .model, tokenizer.json or its folder, or .tiktoken",
    )
    parser.add_argument(
        "--tiktoken-pattern",
        metavar="NAME|REGEX",
        help="how a .tiktoken vocabulary cuts text, which its file does not say: "
        f"{', '.join(PATTERNS)} or an expression (cl100k if it has numbers of several digits, "
        "else qwen)",
    )
    parser.add_argument(
        "--end-of-document",
        metavar="TOKEN",
        help="token that ends documents (the tokenizer's own)",
    )
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with that token (yes)",
    )


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="PREFIX",
        help="path of the output without .bin/.idx/.json",
    )
    parser.add_argument(
        "--holdout",
        action="append",
        default=[],
        type=parse_holdout,
        metavar="NAME=FRACTION",
        help="put this share of the documents into NAME beside the output instead; may be given "
        "several times",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace output that was made from something else",
    )


def _add_execution_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes (one per core: %(default)s)",
    )
    parser.add_argument(
        "--shard",
        type=parse_shard,
        metavar="I/N",
        help="make only every N-th piece, from the I-th on; other machines make the others, then "
        "run once without this",
    )
    parser.add_argument(
        "--executor",
        choices=("local", "slurm"),
        default="local",
        help="slurm: submit the job through datatrove as --tasks array tasks and one that ends "
        "it, and return",
    )
    parser.add_argument(
        "--tasks", type=int, default=64, help="slurm: array tasks, of one core each (%(default)s)"
    )
    parser.add_argument("--slurm-partition", metavar="NAME", help="slurm: partition")
    parser.add_argument(
        "--slurm-time",
        default="04:00:00",
        metavar="LIMIT",
        help="slurm: time limit of a task (%(default)s)",
    )
    parser.add_argument(
        "--slurm-option",
        action="append",
        default=[],
        type=parse_option,
        metavar="NAME=VALUE",
        help="slurm: a further sbatch option",
    )
    parser.add_argument(
        "--slurm-logs", type=Path, metavar="FOLDER", help="slurm: where logs go (OUTPUT.logs)"
    )


if __name__ == "__main__":
    sys.exit(main())
