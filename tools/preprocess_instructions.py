r"""Turn conversations into packed Megatron token files whose loss counts on the assistant's text.

    python tools/preprocess_instructions.py --input chats.jsonl --tokenizer tokenizer/ \
        --sequence-length 2048 --output data/chats
    python tools/preprocess_instructions.py --input gsm8k.jsonl --prompt-key question \
        --response-key answer --template plain.jinja --tokenizer tokenizer.model \
        --sequence-length 512 --output data/maths --holdout maths_valid=0.02

A line is {"messages": [{"role": ..., "content": ...}, ...]} or has a prompt and a response. Whole
conversations are packed into samples of the given length, which must be the run's
batch.sequence_length. PREFIX.roles marks the tokens whose loss counts and where conversations
begin. Train with data.document_attention = "within", alone or beside plain text
(data.train_weights). Files appear under their names only when everything is done. The same command,
run again after any interruption, continues from finished pieces.

Exit codes: 0 done, 2 bad input, 5 no space left (finished pieces are kept), 1 another failure,
130 interrupted.
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
    run_and_report,
)
from megatron_kd.data.preparation.jobs.chat_job import ChatRequest, plan_chats
from megatron_kd.data.preparation.jobs.conversations import MessageKeys
from megatron_kd.data.preparation.jobs.execution import existing_output, make_output


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, make the token files and print a summary."""
    parsed = parse_arguments(arguments)
    return run_and_report("preprocess_instructions", "conversations", lambda: run(parsed))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the output and return the summary."""
    template = arguments.template
    plan = plan_chats(
        ChatRequest(
            inputs=arguments.input,
            output=arguments.output,
            tokenizer=arguments.tokenizer,
            sequence_length=arguments.sequence_length,
            template=template and template.read_text(encoding="utf-8"),
            patterns=arguments.pattern,
            holdout=arguments.holdout,
            end_of_document=arguments.end_of_document,
            pattern=arguments.tiktoken_pattern,
            strict=arguments.strict,
            keys=MessageKeys(arguments.messages_key, arguments.prompt_key, arguments.response_key),
        )
    )
    summary = existing_output(plan, overwrite=arguments.overwrite)
    if summary is not None:
        return summary
    progress = PieceProgress(plan.size)
    return make_output(plan, arguments.workers, progress.report) | progress.close()


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_input_options(parser)
    _add_output_options(parser)
    parsed = parser.parse_args(arguments)
    check_outputs(parser, parsed.output, parsed.holdout)
    if parsed.sequence_length < 2 or parsed.workers < 1:
        parser.error("--sequence-length must be at least 2, --workers at least 1")
    return parsed


def _add_input_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help=".jsonl files, also compressed, folders or quoted globs",
    )
    add(
        "--pattern",
        nargs="+",
        default=["*.jsonl*"],
        metavar="GLOB",
        help="names of the files to take from folders (*.jsonl*)",
    )
    add(
        "--messages-key",
        default="messages",
        metavar="KEY",
        help="key of the list of messages (messages)",
    )
    add(
        "--prompt-key",
        default="prompt",
        metavar="KEY",
        help="key of the prompt, in lines without messages (prompt)",
    )
    add("--response-key", default="response", metavar="KEY", help="key of the response (response)")
    add("--template", type=Path, metavar="FILE", help="jinja chat template (the tokenizer's own)")
    add(
        "--tokenizer",
        required=True,
        metavar="PATH",
        help="SentencePiece .model, tokenizer.json or its folder, or .tiktoken",
    )
    add("--tiktoken-pattern", metavar="NAME|REGEX", help="see preprocess_data.py")
    add(
        "--end-of-document",
        metavar="TOKEN",
        help="token that ends documents and fills samples up (the tokenizer's own)",
    )


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--sequence-length",
        type=int,
        required=True,
        metavar="N",
        help="tokens of a sample: the run's batch.sequence_length",
    )
    add(
        "--output",
        required=True,
        type=Path,
        metavar="PREFIX",
        help="path of the output without .bin/.idx/.roles/.json",
    )
    add(
        "--holdout",
        action="append",
        default=[],
        type=parse_holdout,
        metavar="NAME=FRACTION",
        help="put this share of the conversations into NAME beside the output instead; may be "
        "given several times",
    )
    add("--overwrite", action="store_true", help="replace output that was made from something else")
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes (one per core: %(default)s)",
    )
    add(
        "--strict",
        action="store_true",
        help="stop at the first line that cannot be used, in place of counting it",
    )


if __name__ == "__main__":
    sys.exit(main())
