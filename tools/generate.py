"""Continue prompts with a trained model.

    python tools/generate.py runs/student --prompt "def main(" --max-new-tokens 64
    python tools/generate.py runs/student --prompts prompts.txt --temperature 0.8 --top-p 0.95 --seed 1 --stop "\\n\\n" --json
    torchrun --nproc-per-node 2 tools/generate.py runs/student --prompt "import " --tensor 2

The tokenizer is that of the run's config.toml unless --tokenizer names it. Temperature 0, the default, takes the likeliest token. A
draw depends on the seed and on the places of prompt and token alone: batches and layouts do not change it.

Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_kd.config import ConfigError
from megatron_kd.parallel.world import world_from_environment


def main(argv: list[str] | None = None) -> int:
    """Parse, load, generate, print."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except ConfigError as error:
        print(f"generate: error: {error}", file=sys.stderr, flush=True)
        return 2


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
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest continuation (64)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="divides the logits; 0: the likeliest token (0)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="draw among the likeliest tokens that reach this probability (1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (0)")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        help="end before this text, with \\n and the like; may be repeated",
    )
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


def _run(arguments: argparse.Namespace) -> int:
    prompts, stop = _prompts(arguments), tuple(_unescape(text, "--stop") for text in arguments.stop)
    if arguments.batch_size < 1:
        raise ConfigError(f"--batch-size ({arguments.batch_size}) must be at least 1")
    from megatron_kd.checkpoint.store import find_checkpoint, read_info
    from megatron_kd.parallel.platform import start_platform

    folder = find_checkpoint(arguments.checkpoint, what="checkpoint")
    info = read_info(folder, what="checkpoint")
    rank, world_size, local_rank = world_from_environment()
    platform = start_platform(arguments.device, local_rank)
    from megatron_kd.inference.frozen_model import FrozenModel, inference_layout, tokenizer_of
    from megatron_kd.inference.generate import Sampling, generate
    from megatron_kd.parallel.groups import start_groups, stop_groups

    sampling = Sampling(
        arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed, stop
    )
    tokenizer, known = tokenizer_of(folder, info, arguments.tokenizer)
    layout = inference_layout(
        info, tensor=arguments.tensor, pipeline=arguments.pipeline, world_size=world_size
    )
    if world_size != arguments.tensor * arguments.pipeline:
        raise ConfigError(
            f"{world_size} processes were started for --tensor x --pipeline = {arguments.tensor * arguments.pipeline}"
        )
    try:
        groups = start_groups(platform, layout, timeout_seconds=600)
        model = FrozenModel(
            folder,
            info,
            groups,
            layout,
            precision=arguments.precision or info.precision,
            sequence_length=1,
        )
        if known.end_of_document is None and not all(prompts):
            raise ConfigError(
                "an empty prompt begins after an end of document, and this tokenizer has none: give a prompt"
            )
        found = generate(
            model,
            tokenizer,
            prompts,
            sampling,
            end_of_document=known.end_of_document,
            batch_size=arguments.batch_size,
        )
    finally:
        stop_groups()
    for prompt, each in zip(prompts, found, strict=True):
        if rank == 0 and arguments.json:
            print(
                json.dumps(
                    {
                        "prompt": prompt,
                        "text": each.text,
                        "tokens": each.tokens,
                        "finish": each.finish,
                    },
                    ensure_ascii=False,
                )
            )
        elif rank == 0:
            print(f"{prompt}{each.text}\n--- {len(each.tokens)} tokens, {each.finish}")
    return 0


def _prompts(arguments: argparse.Namespace) -> list[str]:
    found = list(arguments.prompt)
    if arguments.prompts is not None:
        try:
            lines = arguments.prompts.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts {arguments.prompts} cannot be read ({error})") from error
        found += [_unescape(line, f"--prompts {arguments.prompts}") for line in lines]
    if not found:
        raise ConfigError("give at least one --prompt, or --prompts FILE")
    return found


def _unescape(text: str, what: str) -> str:
    """Text with \\n, \\t, \\" and \\uXXXX as in a JSON string; other quotes need no backslash."""
    try:
        return str(
            json.loads('"' + text.replace('\\"', '"').replace('"', '\\"') + '"', strict=False)
        )
    except ValueError as error:
        raise ConfigError(
            f"{what}: {text!r} is no text with JSON escapes ({error}): write a backslash as two"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
