r"""Continue prompts with a trained model.

    python tools/generate.py runs/student --prompt "def main(" --max-new-tokens 64
    python tools/generate.py runs/student --prompts prompts.txt \
        --temperature 0.8 --top-p 0.95 --seed 1 --stop "\n\n" --json
    torchrun --nproc-per-node 2 tools/generate.py runs/student --prompt "import " --tensor 2

The tokenizer is the one in the run's config.toml, unless --tokenizer names another. Temperature 0,
the default, takes the most probable token. A sample depends on the seed and on the positions of
prompt and token only: batches and layouts do not change it.

Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_kd.config import ConfigError
from megatron_kd.parallel.world import world_from_environment
from megatron_kd.storage.exit_codes import BAD_INPUT, FINISHED

if TYPE_CHECKING:
    from megatron_kd.inference.generate import Continuation


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except ConfigError as error:
        print(f"generate: error: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint", type=Path, help="run directory, its checkpoints folder, or one step-* folder"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="a prompt; may be repeated; empty: the start of a document",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        help="file with one prompt per line, with \\n and the like as in a JSON string",
    )
    parser.add_argument("--tokenizer", type=Path, help="the model's tokenizer")
    _add_sampling_options(parser)
    parser.add_argument("--batch-size", type=int, default=8, help="prompts continued together (8)")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel size (1)")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline-parallel size (1)")
    parser.add_argument(
        "--precision",
        choices=["bf16", "fp32"],
        help="type of weights and activations (that of the checkpoint)",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cuda", "cpu"],
        default="auto",
        help="auto takes CUDA where there is one",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt")
    return parser


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest continuation (64)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="divides the logits; 0: the most probable token (0)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="sample from the most probable tokens that reach this probability (1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (0)")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        help="end before this text, with \\n and the like; may be repeated",
    )


def _run(arguments: argparse.Namespace) -> int:
    prompts = _prompts(arguments)
    stop = tuple(_unescape(text, "--stop") for text in arguments.stop)
    if arguments.batch_size < 1:
        raise ConfigError(f"--batch-size ({arguments.batch_size}) must be at least 1")
    continuations = _generate(arguments, prompts, stop)
    if world_from_environment()[0] == 0:
        for prompt, continuation in zip(prompts, continuations, strict=True):
            _print(prompt, continuation, as_json=arguments.json)
    return FINISHED


def _generate(
    arguments: argparse.Namespace, prompts: list[str], stop: tuple[str, ...]
) -> list[Continuation]:
    from megatron_kd.checkpoint.store import find_checkpoint, read_info
    from megatron_kd.parallel.platform import start_platform

    folder = find_checkpoint(arguments.checkpoint, setting="checkpoint")
    info = read_info(folder, setting="checkpoint")
    _, world_size, local_rank = world_from_environment()
    # Before any other import of megatron-core: on a CPU it must be prepared first.
    platform = start_platform(arguments.device, local_rank)
    from megatron_kd.inference.frozen_model import (
        FrozenModel,
        inference_layout,
        load_checkpoint_tokenizer,
    )
    from megatron_kd.inference.generate import Sampling, generate
    from megatron_kd.parallel.groups import start_groups, stop_groups

    sampling = Sampling(
        arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed, stop
    )
    tokenizer, tokenizer_info = load_checkpoint_tokenizer(folder, info, arguments.tokenizer)
    sizes = {"tensor": arguments.tensor, "pipeline": arguments.pipeline}
    layout = inference_layout(info, **sizes, world_size=world_size)
    if world_size != arguments.tensor * arguments.pipeline:
        raise ConfigError(
            f"{world_size} processes were started for --tensor x --pipeline = "
            f"{arguments.tensor * arguments.pipeline}"
        )
    try:
        groups = start_groups(platform, layout, timeout_seconds=600)
        precision = arguments.precision or info.precision
        model = FrozenModel(folder, info, groups, layout, precision=precision, sequence_length=1)
        return generate(
            model,
            tokenizer,
            prompts,
            sampling,
            end_of_document=tokenizer_info.end_of_document,
            batch_size=arguments.batch_size,
        )
    finally:
        stop_groups()


def _print(prompt: str, continuation: Continuation, *, as_json: bool) -> None:
    if not as_json:
        tokens = len(continuation.tokens)
        print(f"{prompt}{continuation.text}\n--- {tokens} tokens, {continuation.finish}")
        return
    record = {
        "prompt": prompt,
        "text": continuation.text,
        "tokens": continuation.tokens,
        "finish": continuation.finish,
    }
    print(json.dumps(record, ensure_ascii=False))


def _prompts(arguments: argparse.Namespace) -> list[str]:
    prompts = list(arguments.prompt)
    if arguments.prompts is not None:
        try:
            lines = arguments.prompts.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts {arguments.prompts} cannot be read ({error})") from error
        prompts += [_unescape(line, f"--prompts {arguments.prompts}") for line in lines]
    if not prompts:
        raise ConfigError("give at least one --prompt, or --prompts FILE")
    return prompts


def _unescape(text: str, setting: str) -> str:
    r"""Decode \n, \t, \" and \uXXXX as in a JSON string; other quotes need no backslash."""
    try:
        return str(
            json.loads('"' + text.replace('\\"', '"').replace('"', '\\"') + '"', strict=False)
        )
    except ValueError as error:
        raise ConfigError(
            f"{setting}: {text!r} is not text with JSON escapes ({error}): write a backslash as two"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
