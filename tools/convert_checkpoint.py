r"""Convert a model between a Hugging Face folder and a checkpoint of this program.

Families: Llama 3, Qwen2/2.5, Qwen3 and Mistral, dense.

    python tools/convert_checkpoint.py from-huggingface models/Qwen3-0.6B \
        --output teachers/qwen3 --tokenizer models/Qwen3-0.6B --check
    python tools/convert_checkpoint.py to-huggingface runs/student \
        --output exported/student --tokenizer data/tokenizer.model --check
    python tools/convert_checkpoint.py from-megatron other/iter_0010000 \
        --model model.toml --output teachers/other

An imported model is a checkpoint like any other: use it as teacher.checkpoint or
checkpoint.initialize_from, in any tensor- and pipeline-parallel layout. The model section is
printed and saved as OUTPUT/model.toml. Only safetensors files are read, and no code of a model
folder is run. The conversion needs memory for the largest tensor, or for one output file. --check
compares the logits of both sides on random tokens in fp32; it needs transformers and memory for the
whole model in fp32.

Exit codes: 0 converted, and the logits agree under --check; 1 --check found a difference; 2 bad
input; 5 the disk is full or not writable.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_kd.config import ConfigError, ModelSection
from megatron_kd.storage.exit_codes import BAD_INPUT, WRITE_FAILED

if TYPE_CHECKING:
    from megatron_kd.checkpoint.store import CheckpointInfo

SAVED_CONFIG, MODEL_FILE = "huggingface_config.json", "model.toml"


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments and run the command."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except ConfigError as error:
        print(f"convert_checkpoint: error: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT
    except OSError as error:
        print(
            f"convert_checkpoint: stopped: {error}: no partial output remains; free space or "
            "choose another --output",
            file=sys.stderr,
        )
        return WRITE_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    importer = commands.add_parser(
        "from-huggingface", help="convert a folder with config.json and safetensors"
    )
    importer.set_defaults(run=_from_huggingface)
    _add_import_options(importer)
    exporter = commands.add_parser("to-huggingface", help="convert a checkpoint to a model folder")
    exporter.set_defaults(run=_to_huggingface)
    _add_export_options(exporter)
    adopter = commands.add_parser(
        "from-megatron",
        help="convert a distributed checkpoint of another megatron-core program, Llama-style",
    )
    adopter.set_defaults(run=_from_megatron)
    adopter.add_argument("input", type=Path, help="folder with .metadata and *.distcp")
    adopter.add_argument(
        "--model",
        type=Path,
        required=True,
        help="TOML file with the model's [model] table, vocab_size included",
    )
    for command in (importer, exporter, adopter):
        command.add_argument(
            "--output", type=Path, required=True, help="folder to write; must not exist"
        )
        command.add_argument(
            "--tokenizer",
            type=Path,
            help="the model's tokenizer; its digest is stored with the weights",
        )
    for command in (importer, exporter):
        command.add_argument(
            "--check", action="store_true", help="compare the logits of both sides"
        )
    return parser


def _add_import_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("input", type=Path, help="folder of the model")
    command.add_argument(
        "--precision",
        choices=["bf16", "fp32"],
        help="type of the checkpoint (default: bf16 for bf16, fp32 for fp16 and fp32)",
    )
    command.add_argument(
        "--vocab-size",
        type=int,
        help="number of ids to keep; further rows of the embedding are padding that the tokenizer "
        "does not use",
    )
    command.add_argument(
        "--vocab-size-multiple",
        type=int,
        default=128,
        help="pad the vocabulary to a multiple of this (default: 128)",
    )


def _add_export_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "input", type=Path, help="run directory, its checkpoints folder, or one step-* folder"
    )
    command.add_argument(
        "--max-positions",
        type=int,
        help="longest sequence, tokens (default: batch.sequence_length of the run, or that of the "
        "imported model)",
    )
    command.add_argument(
        "--shard-gigabytes",
        type=float,
        default=2.0,
        help="largest output file, 1e9 bytes (default: 2)",
    )


def _from_huggingface(arguments: argparse.Namespace) -> int:
    _must_not_exist(arguments.output)
    from megatron_kd.checkpoint.conversion.from_huggingface import (
        open_huggingface,
        write_checkpoint,
    )

    if arguments.vocab_size_multiple < 1:
        raise ConfigError(
            f"--vocab-size-multiple ({arguments.vocab_size_multiple}) must be at least 1"
        )
    source = open_huggingface(
        arguments.input,
        vocab_size=arguments.vocab_size,
        vocab_size_multiple=arguments.vocab_size_multiple,
        precision=arguments.precision,
    )
    digest = _digest(arguments.tokenizer, source.vocab_size)
    saved = {SAVED_CONFIG: (json.dumps(dict(source.config), indent=2) + "\n").encode()}
    folder = write_checkpoint(
        arguments.output, source, tokenizer=digest, files={**saved, **_model_file(source.model)}
    )
    _report(arguments.output, folder, digest)
    return _check(folder, arguments.input) if arguments.check else 0


def _from_megatron(arguments: argparse.Namespace) -> int:
    _must_not_exist(arguments.output)
    from megatron_kd.checkpoint.conversion.from_megatron import adopt_checkpoint

    model = _read_model(arguments.model)
    assert model.vocab_size is not None
    digest = _digest(arguments.tokenizer, model.vocab_size)
    folder = adopt_checkpoint(
        arguments.input, model, arguments.output, tokenizer=digest, files=_model_file(model)
    )
    _report(arguments.output, folder, digest)
    return 0


def _to_huggingface(arguments: argparse.Namespace) -> int:
    from megatron_kd.checkpoint.conversion.to_huggingface import write_huggingface
    from megatron_kd.checkpoint.store import find_checkpoint, read_info

    if not 0 < arguments.shard_gigabytes < float("inf"):
        raise ConfigError(f"--shard-gigabytes ({arguments.shard_gigabytes}) must be > 0 and finite")
    if arguments.max_positions is not None and arguments.max_positions < 1:
        raise ConfigError(f"--max-positions ({arguments.max_positions}) must be at least 1")
    folder = find_checkpoint(arguments.input, setting="input")
    info = read_info(folder, setting="input")
    saved = _saved_config(folder)
    if arguments.tokenizer is not None:
        digest = _digest(arguments.tokenizer, info.vocab_size)
        if info.tokenizer is not None and digest != info.tokenizer:
            raise ConfigError(
                f"--tokenizer {arguments.tokenizer} is not the tokenizer of this model (digest "
                f"{digest}, the model's {info.tokenizer})"
            )
    files = _tokenizer_files(arguments.tokenizer)
    config = write_huggingface(
        arguments.output,
        folder,
        info,
        max_positions=arguments.max_positions or _max_positions(folder, saved),
        special_ids=_special_ids(arguments.tokenizer, saved),
        shard_bytes=int(arguments.shard_gigabytes * 1e9),
        files=files,
    )
    print(json.dumps(config, indent=2))
    if (
        config["model_type"] == "qwen2"
        and files
        and b"Qwen2Tokenizer" not in files["tokenizer_config.json"]
    ):
        print(
            "note: transformers 5 uses its own tokenizer for qwen2 models, whatever "
            "tokenizer_config.json says, and may encode text otherwise than this tokenizer: "
            "compare the ids before you use AutoTokenizer (tools/evaluate.py tasks does)",
            file=sys.stderr,
        )
    print(f"written: {arguments.output}")
    return _check(folder, arguments.output) if arguments.check else 0


def _must_not_exist(output: Path) -> None:
    if output.exists():
        raise ConfigError(f"--output {output} exists already: choose another name")


def _read_model(path: Path) -> ModelSection:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        model = ModelSection.model_validate(content.get("model", content))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--model {path} holds no usable [model] table ({' '.join(str(error).split())[:300]})"
        ) from error
    if model.vocab_size is None:
        raise ConfigError(f"--model {path} must set model.vocab_size, the true number of ids")
    return model


def _digest(tokenizer: Path | None, vocab_size: int) -> str | None:
    if tokenizer is None:
        print(
            "note: no --tokenizer: no digest of the vocabulary is stored with the weights, so a "
            "run cannot verify that it uses the same ids",
            file=sys.stderr,
        )
        return None
    from megatron_kd.data.tokenizer import load_tokenizer

    info = load_tokenizer(tokenizer)[1]
    if info.vocab_size > vocab_size:
        raise ConfigError(
            f"--tokenizer {tokenizer} has {info.vocab_size} ids, the model only {vocab_size}: it "
            "belongs to another model"
        )
    return info.digest


def _model_file(model: ModelSection) -> dict[str, bytes]:
    """Return the model section as a file that --model and a run file accept."""
    from megatron_kd.config.dump import section_toml

    return {MODEL_FILE: section_toml(model, "model").encode()}


def _report(output: Path, folder: Path, digest: str | None) -> None:
    """Print the saved model section and how to use the checkpoint."""
    from megatron_kd.checkpoint.store import read_info
    from megatron_kd.planning.parameters import parameter_count

    info = read_info(folder, setting="output")
    model = info.model_section()
    print((output / MODEL_FILE).read_text(encoding="utf-8"))
    print(
        f"written: {folder} ({parameter_count(model, info.vocab_size):,} weights, "
        f"{info.precision}, tokenizer {digest or 'unknown'})"
    )
    print(
        f'use it in any layout as teacher.checkpoint = "{output}" or '
        f'checkpoint.initialize_from = "{output}"'
    )


def _saved_config(folder: Path) -> dict[str, Any]:
    """Return the config.json that was saved with an imported model; empty without one."""
    path = folder.parent.parent / SAVED_CONFIG
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _max_positions(folder: Path, saved: dict[str, Any]) -> int:
    if "max_position_embeddings" in saved:
        return int(saved["max_position_embeddings"])
    run = folder.parent.parent / "config.toml"
    if not run.is_file():
        raise ConfigError(
            "--max-positions is needed: the checkpoint is not in a run directory, whose "
            "config.toml would state the sequence length"
        )
    return int(tomllib.loads(run.read_text(encoding="utf-8"))["batch"]["sequence_length"])


def _special_ids(tokenizer: Path | None, saved: dict[str, Any]) -> dict[str, int]:
    ids = {
        name: saved[name]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if saved.get(name) is not None
    }
    if tokenizer is not None and "eos_token_id" not in ids:
        from megatron_kd.data.tokenizer import load_tokenizer

        ids["eos_token_id"] = load_tokenizer(tokenizer)[1].end_of_document
    return ids


def _tokenizer_files(tokenizer: Path | None) -> dict[str, bytes]:
    if tokenizer is None:
        return {}
    from megatron_kd.data.tokenizer_files import huggingface_files

    return huggingface_files(tokenizer)


def _check(checkpoint: Path, huggingface: Path) -> int:
    """Print the comparison of both sides and return the exit code: 1 if they differ."""
    from megatron_kd.parallel.platform import start_platform

    platform = start_platform("cpu")
    from megatron_kd.checkpoint.store import read_info
    from megatron_kd.config import ParallelSection
    from megatron_kd.inference.logit_parity import (
        LIMIT,
        checkpoint_logits,
        compare,
        huggingface_logits,
        random_tokens,
    )
    from megatron_kd.parallel.groups import start_groups, stop_groups

    info: CheckpointInfo = read_info(checkpoint, setting="check")
    tokens = random_tokens(info, seed=0)
    expected = huggingface_logits(huggingface, tokens)
    layout = ParallelSection()
    try:
        groups = start_groups(platform, layout, timeout_seconds=600)
        logits = checkpoint_logits(checkpoint, info, groups, layout, tokens)
    finally:
        stop_groups()
    assert logits is not None
    result = compare(logits, expected)
    verdict = "the same model" if result.same else "NOT the same model"
    print(
        f"check: largest difference of logits {result.difference:.2e} over {result.tokens} random "
        f"tokens (largest logit {result.scale:.3g}, limit {LIMIT:g}): {verdict}"
    )
    return 0 if result.same else 1


if __name__ == "__main__":
    sys.exit(main())
