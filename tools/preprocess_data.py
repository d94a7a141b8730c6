"""Turn text into Megatron token files.

    python tools/preprocess_data.py --input corpus/ --pattern '*.txt' --tokenizer tokenizer.model --output data/train --holdout valid=0.05
    python tools/preprocess_data.py --input 'shards/*.jsonl.zst' more.parquet --tokenizer tokenizer.json --output data/train

writes data/train.{bin,idx,json} and, from documents chosen by a hash of their names, data/valid.{bin,idx,json}: byte for byte what
Megatron's own tool writes for the same documents in the same order, for any number of workers. Files appear under their names only
when everything is done; until then finished pieces wait in data/train.pieces/, and the same command, run again after any
interruption, goes on from them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_kd.data.preparation.command_line import (
    Progress,
    check_outputs,
    parse_holdout,
    run_and_report,
)
from megatron_kd.data.preparation.documents import FORMATS
from megatron_kd.data.preparation.preprocess import (
    Plan,
    already_made,
    make_plan,
    make_share,
    make_whole,
    submit,
)
from megatron_kd.data.vocabularies.patterns import PATTERNS

_EXIT_CODES = "Exit codes: 0 done, 2 bad input, 5 no space left (finished pieces are kept), 1 another failure, 130 interrupted."


def parse_shard(text: str) -> tuple[int, int]:
    try:
        share, of = (int(part) for part in text.split("/"))
    except ValueError:
        share, of = 0, 0
    if not 0 <= share < of:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 0 <= I < N, such as 0/4")
    return share, of


def parse_option(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not name or not separator or "\n" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, such as account=project")
    return name, value


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Turn text into Megatron token files (.bin/.idx) with a .json description beside them. "
        "Run the same command again after an interruption: finished pieces are kept.",
        epilog=_EXIT_CODES,
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH",
        help="files, folders or quoted globs: text (one document a file), .jsonl (one a line), .parquet (one a row); the first two "
        "also as .gz, .zst, .bz2, .xz (each read by one worker)")  # fmt: skip
    add(
        "--pattern",
        nargs="+",
        default=["*"],
        metavar="GLOB",
        help="names of the files to take from folders (all)",
    )
    add(
        "--exclude",
        nargs="+",
        default=[],
        metavar="GLOB",
        help="names of files and subfolders to leave out",
    )
    add("--format", choices=FORMATS, default="auto", help="what the files hold (by their names)")
    add(
        "--text-key", default="text", help="key or column of the text in .jsonl and .parquet (text)"
    )
    add(
        "--tokenizer",
        required=True,
        metavar="PATH",
        help="SentencePiece .model, tokenizer.json or its folder, or .tiktoken",
    )
    add("--tiktoken-pattern", metavar="NAME|REGEX",
        help=f"how a .tiktoken vocabulary cuts text, which its file does not say: {', '.join(PATTERNS)} or an expression "
        "(cl100k where it has numbers of several digits, else qwen)")  # fmt: skip
    add(
        "--end-of-document", metavar="TOKEN", help="token that ends documents (the tokenizer's own)"
    )
    add(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with that token (yes)",
    )
    add(
        "--output",
        required=True,
        type=Path,
        metavar="PREFIX",
        help="path of the output without .bin/.idx/.json",
    )
    add("--holdout", action="append", default=[], type=parse_holdout, metavar="NAME=FRACTION",
        help="put this share of the documents into NAME beside the output instead; may be given several times")  # fmt: skip
    add("--overwrite", action="store_true", help="replace output that was made from something else")
    add(
        "--strict",
        action="store_true",
        help="stop at the first document that cannot be read, in place of counting it",
    )
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes (one per core: %(default)s)",
    )
    add("--shard", type=parse_shard, metavar="I/N",
        help="make only every N-th piece, from the I-th on, for other machines to make the others; then run once without this")  # fmt: skip
    add("--executor", choices=("local", "slurm"), default="local",
        help="slurm: submit the job through datatrove as --tasks array tasks and one that ends it, and return")  # fmt: skip
    add("--tasks", type=int, default=64, help="slurm: array tasks, of one core each (%(default)s)")
    add("--slurm-partition", metavar="NAME", help="slurm: partition")
    add(
        "--slurm-time",
        default="04:00:00",
        metavar="LIMIT",
        help="slurm: time limit of a task (%(default)s)",
    )
    add(
        "--slurm-option",
        action="append",
        default=[],
        type=parse_option,
        metavar="NAME=VALUE",
        help="slurm: a further sbatch option",
    )
    add("--slurm-logs", type=Path, metavar="FOLDER", help="slurm: where logs go (OUTPUT.logs)")
    return parser


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    check_outputs(parser, parsed.output, parsed.holdout)
    if parsed.workers < 1 or parsed.tasks < 1:
        parser.error("--workers and --tasks must be at least 1")
    if parsed.executor == "slurm" and not parsed.slurm_partition:
        parser.error("--executor slurm needs --slurm-partition")
    return parsed


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    plan = make_plan(
        arguments.input, arguments.output, arguments.tokenizer,
        patterns=arguments.pattern, exclude=arguments.exclude, format=arguments.format, holdout=arguments.holdout,
        append_eod=arguments.append_eod, text_key=arguments.text_key, end_of_document=arguments.end_of_document,
        pattern=arguments.tiktoken_pattern, strict=arguments.strict,
    )  # fmt: skip
    made = already_made(plan, overwrite=arguments.overwrite)
    if made is not None:
        return made
    if arguments.executor == "slurm":
        logs = arguments.slurm_logs or arguments.output.with_name(f"{arguments.output.name}.logs")
        options = dict(arguments.slurm_option)
        jobs = submit(
            plan,
            tasks=arguments.tasks,
            partition=arguments.slurm_partition,
            time_limit=arguments.slurm_time,
            logs=logs,
            options=options,
        )
        return {"submitted": jobs, "logs": str(logs), "pieces": len(plan.pieces)}
    return make(plan, arguments)


def make(plan: Plan, arguments: argparse.Namespace) -> dict[str, Any]:
    progress = Progress(plan.size)
    if arguments.shard is not None:
        share, of = arguments.shard
        make_share(plan, share, of, arguments.workers, progress)
        return {
            "shard": f"{share}/{of}",
            "pieces": len(range(share, len(plan.pieces), of)),
            **progress.summary(),
        }
    return make_whole(plan, arguments.workers, progress) | progress.summary()


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    return run_and_report("preprocess_data", "documents", lambda: run(parsed))


if __name__ == "__main__":
    sys.exit(main())
