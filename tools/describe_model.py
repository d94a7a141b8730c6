r"""Print parameters, FLOPs per token and memory per rank of a model, before anything is started.

    python tools/describe_model.py                                                    # the presets
    python tools/describe_model.py --preset llama-3.2-1b --ranks 8 --parallel.tensor 2 \
        --optimizer.distributed true
    python tools/describe_model.py --config run.toml --ranks 64 --parallel.pipeline 4 --json

Keys of the run file are overridden as --section.key value. Without --config, sequences are 4096
tokens, one per rank and step. A teacher.checkpoint that exists is counted too. Weights, gradients
and optimizer state are exact. Activations are an estimate (planning/memory.py describes it), and
the framework itself is not counted.

Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from megatron_kd.config import ConfigError, RunConfig
from megatron_kd.planning.planned_run import PlannedRun
from megatron_kd.planning.reports.config_words import load_run_file, load_with_defaults
from megatron_kd.planning.reports.describe import describe_presets, describe_run
from megatron_kd.storage.exit_codes import BAD_INPUT
from megatron_kd.teacher.source import teacher_source

MEMORY_COLUMNS = (
    *("weights", "gradients", "optimizer", "activations", "teacher", "hidden_states", "total"),
)


def main(argv: list[str] | None = None) -> int:
    """Parse, compute, print."""
    arguments, overrides = _parser().parse_known_args(argv)
    try:
        if arguments.ranks is not None and arguments.ranks < 1:
            raise ConfigError(f"--ranks ({arguments.ranks}) must be at least 1")
        if arguments.config is None and arguments.preset is None and not overrides:
            description: Any = describe_presets()
            text = _preset_table(description)
        else:
            run = _planned_run(_config(arguments, overrides))
            description = describe_run(run, arguments.ranks)
            text = _text(description)
    except ConfigError as error:
        print(f"describe_model: error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(json.dumps(description, indent=2) if arguments.json else text)
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
        return load_run_file(arguments.config, arguments.preset, overrides)
    defaults = {"--batch.global_batch_size": str(arguments.ranks or 1)}
    if arguments.preset is not None:
        defaults["--model.preset"] = arguments.preset
    return load_with_defaults(overrides, defaults)


def _planned_run(config: RunConfig) -> PlannedRun:
    vocab_size = config.model.vocab_size or _tokenizer_size(config)
    device = "cpu" if config.train.device == "cpu" else "cuda"
    return PlannedRun(config, vocab_size, teacher_source(config).read_model(), device)


def _tokenizer_size(config: RunConfig) -> int:
    from megatron_kd.data.tokenizer import load_tokenizer

    assert config.data.tokenizer is not None
    return load_tokenizer(config.data.tokenizer)[1].vocab_size


def _preset_table(presets: list[dict[str, Any]]) -> str:
    header = (
        f"{'preset':14}{'weights':>9}{'without':>9}{'hidden':>8}{'layers':>8}{'heads':>7}"
        f"{'groups':>8}{'ffn':>7}{'vocab':>9}  tied"
    )
    lines = [header, f"{'':23}{'embed.':>9}"]
    for preset in presets:
        parameters = preset["parameters"]
        lines.append(
            f"{preset['preset']:14}{_short(parameters['total']):>9}"
            f"{_short(parameters['without_embeddings']):>9}{preset['hidden_size']:>8}"
            f"{preset['num_layers']:>8}{preset['num_attention_heads']:>7}"
            f"{preset['num_query_groups']:>8}{preset['ffn_hidden_size']:>7}"
            f"{preset['vocab_size']:>9}  {'yes' if preset['tied_embeddings'] else 'no'}"
        )
    return "\n".join(lines)


def _text(description: dict[str, Any]) -> str:
    parameters, flops = description["parameters"], description["flops_per_token"]
    layout = description["layout"]
    lines = [
        f"weights            {parameters['total']:,} ({_short(parameters['total'])}), without "
        f"embeddings {parameters['without_embeddings']:,}",
        f"vocabulary         {description['vocab_size']:,} ids",
        f"FLOPs per token    {flops['training']:.3e} training, {flops['forward']:.3e} forward, at "
        f"{description['sequence_length']} tokens per sequence",
    ]
    if "teacher" in description:
        weights = description["teacher"]["parameters"]["total"]
        forward = description["teacher"]["flops_per_token"]["forward"]
        lines.append(
            f"teacher            {_short(weights)} weights, {forward:.3e} FLOPs per token forward"
        )
    lines.append(
        f"layout             {layout['ranks']} ranks: tensor {layout['tensor']} x pipeline "
        f"{layout['pipeline']} x data {layout['data']}"
    )
    lines += ["", "GiB per rank  " + "".join(f"{name:>14}" for name in MEMORY_COLUMNS)]
    for stage in description["memory_per_rank"]:
        sizes = "".join(f"{stage[name] / 2**30:>14.2f}" for name in MEMORY_COLUMNS)
        lines.append(f"  stage {stage['stage']:<6}{sizes}")
    lines.append(
        "activations: an estimate; not counted: the framework, communication buffers, the head's "
        "chunk of logits"
    )
    return "\n".join(lines)


def _short(count: float) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"


if __name__ == "__main__":
    sys.exit(main())
