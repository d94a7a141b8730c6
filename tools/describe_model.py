"""Parameters, FLOPs per token and memory per rank of a model, before anything is started.

    python tools/describe_model.py                                                    # the presets
    python tools/describe_model.py --preset llama-3.2-1b --ranks 8 --parallel.tensor 2 --optimizer.distributed true
    python tools/describe_model.py --config run.toml --ranks 64 --parallel.pipeline 4 --json

Keys of the run file are overridden as --section.key value. Without --config, sequences are 4096 tokens, one per rank and step. A
teacher.checkpoint that exists is counted too. Weights, gradients and optimizer state are exact; activations are an estimate
(planning/state_memory.py says of what), and the framework itself is not counted.

Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from megatron_kd.config import ConfigError, ModelSection, RunConfig, load_config
from megatron_kd.config.presets import PRESETS


def main(argv: list[str] | None = None) -> int:
    """Parse, compute, print."""
    arguments, overrides = _parser().parse_known_args(argv)
    try:
        if arguments.ranks is not None and arguments.ranks < 1:
            raise ConfigError(f"--ranks ({arguments.ranks}) must be at least 1")
        if arguments.config is None and arguments.preset is None and not overrides:
            found: Any = _presets()
            text = _preset_table(found)
        else:
            found = describe(_config(arguments, overrides), arguments.ranks)
            text = _text(found)
    except ConfigError as error:
        print(f"describe_model: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2) if arguments.json else text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="run file")
    parser.add_argument("--preset", help="name of a preset, in place of a run file")
    parser.add_argument("--ranks", type=int, help="processes of the run (tensor * pipeline)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _config(arguments: argparse.Namespace, overrides: list[str]) -> RunConfig:
    if arguments.config is not None:
        return load_config(
            [
                "--config",
                arguments.config,
                *(["--model.preset", arguments.preset] if arguments.preset else []),
                *overrides,
            ]
        )
    defaults = {
        "--data.train": "none",
        "--batch.micro_batch_size": "1",
        "--batch.sequence_length": "4096",
        "--optimizer.learning_rate": "1e-4",
        "--train.steps": "1",
        "--run.directory": "none",
    }
    if arguments.preset is not None:
        defaults["--model.preset"] = arguments.preset
    if "--batch.global_batch_size" not in " ".join(overrides):
        defaults["--batch.global_batch_size"] = str(arguments.ranks or 1)
    given = {word.partition("=")[0] for word in overrides if word.startswith("--")}
    return load_config(
        [word for key, value in defaults.items() if key not in given for word in (key, value)]
        + overrides
    )


def describe(config: RunConfig, ranks: int | None) -> dict[str, Any]:
    """Everything about a run's model as plain numbers: parameters, FLOPs, bytes."""
    from megatron_kd.planning.flops import flops_per_token
    from megatron_kd.planning.state_memory import run_memory

    model, length = config.model, config.batch.sequence_length
    vocab_size = model.vocab_size or _tokenizer_size(config)
    world = ranks or config.parallel.tensor * config.parallel.pipeline
    teacher = _teacher(config)
    found: dict[str, Any] = {
        "model": model.model_dump(mode="json", exclude_none=True),
        "vocab_size": vocab_size,
        "parameters": _parameters(model, vocab_size),
        "sequence_length": length,
        "flops_per_token": {
            "training": flops_per_token(model, vocab_size, length),
            "forward": flops_per_token(model, vocab_size, length, forward_only=True),
        },
        "layout": {
            "ranks": world,
            **config.parallel.model_dump(),
            "data": config.data_parallel_size(world),
        },
        "memory_per_rank": [
            {**dataclasses.asdict(stage), "total": stage.total}
            for stage in run_memory(config, vocab_size, world_size=world, teacher=teacher)
        ],
    }
    if teacher is not None:
        forward = flops_per_token(teacher, vocab_size, length, forward_only=True)
        found["teacher"] = {
            "parameters": _parameters(teacher, vocab_size),
            "flops_per_token": {"forward": forward},
        }
    return found


def _parameters(model: ModelSection, vocab_size: int) -> dict[str, int]:
    from megatron_kd.planning.flops import parameter_count

    total = parameter_count(model, vocab_size)
    embeddings = vocab_size * model.hidden_size * (1 if model.tied_embeddings else 2)
    return {"total": total, "embeddings": embeddings, "without_embeddings": total - embeddings}


def _tokenizer_size(config: RunConfig) -> int:
    from megatron_kd.data.tokenizer import load_tokenizer

    assert config.data.tokenizer is not None
    return load_tokenizer(config.data.tokenizer)[1].vocab_size


def _teacher(config: RunConfig) -> ModelSection | None:
    if not config.teacher.enabled or config.teacher.checkpoint is None:
        return None
    from megatron_kd.checkpoint.store import find_checkpoint, read_info

    return read_info(
        find_checkpoint(config.teacher.checkpoint, what="teacher.checkpoint"),
        what="teacher.checkpoint",
    ).model_section()


def _presets() -> list[dict[str, Any]]:
    found = []
    for name, values in PRESETS.items():
        model = ModelSection.model_validate({"preset": name})
        found.append(
            {"preset": name, "parameters": _parameters(model, values["vocab_size"]), **values}
        )
    return found


def _preset_table(found: list[dict[str, Any]]) -> str:
    header = f"{'preset':14}{'weights':>9}{'without':>9}{'hidden':>8}{'layers':>8}{'heads':>7}{'groups':>8}{'ffn':>7}{'vocab':>9}  tied"
    lines = [header, f"{'':23}{'embed.':>9}"]
    for row in found:
        numbers = f"{_short(row['parameters']['total']):>9}{_short(row['parameters']['without_embeddings']):>9}"
        shape = f"{row['hidden_size']:>8}{row['num_layers']:>8}{row['num_attention_heads']:>7}{row['num_query_groups']:>8}"
        tied = "yes" if row["tied_embeddings"] else "no"
        lines.append(
            f"{row['preset']:14}{numbers}{shape}{row['ffn_hidden_size']:>7}{row['vocab_size']:>9}  {tied}"
        )
    return "\n".join(lines)


def _text(found: dict[str, Any]) -> str:
    parameters, flops, layout = found["parameters"], found["flops_per_token"], found["layout"]
    total, rest, length = (
        parameters["total"],
        parameters["without_embeddings"],
        found["sequence_length"],
    )
    lines = [
        f"weights            {total:,} ({_short(total)}), without embeddings {rest:,}",
        f"vocabulary         {found['vocab_size']:,} ids",
        f"FLOPs per token    {flops['training']:.3e} training, {flops['forward']:.3e} forward, at {length} tokens per sequence",
    ]
    if "teacher" in found:
        weights, forward = (
            found["teacher"]["parameters"]["total"],
            found["teacher"]["flops_per_token"]["forward"],
        )
        lines.append(
            f"teacher            {_short(weights)} weights, {forward:.3e} FLOPs per token forward"
        )
    lines.append(
        f"layout             {layout['ranks']} ranks: tensor {layout['tensor']} x pipeline {layout['pipeline']} x data {layout['data']}"
    )
    names = (
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "teacher",
        "hidden_states",
        "total",
    )
    lines += ["", "GiB per rank  " + "".join(f"{name:>14}" for name in names)]
    for row in found["memory_per_rank"]:
        lines.append(
            f"  stage {row['stage']:<6}" + "".join(f"{row[name] / 2**30:>14.2f}" for name in names)
        )
    lines.append(
        "activations: an estimate; not counted: the framework, communication buffers, the head's chunk of logits"
    )
    return "\n".join(lines)


def _short(count: float) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"


if __name__ == "__main__":
    sys.exit(main())
