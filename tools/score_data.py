"""Keep the documents that a teacher finds much likelier than a small reference model does (difference sampling, arXiv 2410.17215).

    python tools/score_data.py --data data/train --teacher runs/teacher --reference runs/small --keep-fraction 0.5 --output data/chosen
    torchrun --nproc-per-node 8 tools/score_data.py --data data/train --teacher teachers/8b --reference runs/small --tensor 4 \\
        --sequence-length 2048 --keep-tokens 50000000000 --output data/chosen

A document's score is the mean over its tokens but the first of log p_teacher - log p_reference, nats. Longer documents than
--sequence-length are cut into windows that see nothing before them; documents never see each other. The documents kept are written
unchanged and in order as OUTPUT.bin, .idx and .json (the tokenizer's digest goes along), and OUTPUT.selection.json says how scores are
distributed and what was kept. Both models must have been trained with the data's tokenizer; they may be converted ones.

Scores are kept in --scores, shard by shard: the same command again goes on after a kill, and another --output with another rule reads
them. Exit codes: 0 done, 1 a failure, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

from megatron_kd.config import ConfigError
from megatron_kd.parallel.world import world_from_environment

_WAIT = 4 * 3600  # seconds that finished ranks wait for the last shard of others


def main(argv: list[str] | None = None) -> int:
    """Parse, score, choose, write."""
    arguments = _parser().parse_args(argv)
    try:
        found = _run(arguments)
        if world_from_environment()[0] == 0:
            print(json.dumps(found, indent=2))
        return 0
    except ConfigError as error:
        print(f"score_data: error: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        print(
            f"score_data: {error}: finished shards are kept; start again",
            file=sys.stderr,
            flush=True,
        )
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, metavar="PREFIX", help="token file, without .bin/.idx")
    add(
        "--teacher",
        required=True,
        type=Path,
        help="checkpoint: run directory, its checkpoints folder, or one step-* folder",
    )
    add("--reference", required=True, type=Path, help="checkpoint of the small model")
    add(
        "--output",
        required=True,
        type=Path,
        metavar="PREFIX",
        help="the token file to make; it must not exist",
    )
    add("--keep-fraction", type=float, help="keep this share of the scored documents, the highest")
    add("--threshold", type=float, help="keep documents with at least this score, nats per token")
    add("--keep-tokens", type=int, help="keep the highest documents up to this many tokens")
    add("--scores", type=Path, help="folder of the scores (OUTPUT.scores)")
    add(
        "--sequence-length",
        type=int,
        help="tokens of a window (the teacher's run's batch.sequence_length)",
    )
    add("--batch-size", type=int, default=8, help="windows of one forward pass (8)")
    add(
        "--shard-tokens",
        type=int,
        default=4_000_000,
        help="tokens of a shard, the unit of resuming (4,000,000)",
    )
    add("--tensor", type=int, default=1, help="tensor-parallel size of both models (1)")
    add("--pipeline", type=int, default=1, help="pipeline-parallel size of both models (1)")
    add(
        "--precision",
        choices=["bf16", "fp32"],
        help="type of weights and activations (that of the teacher's checkpoint)",
    )
    add(
        "--device",
        choices=["auto", "cuda", "cpu"],
        default="auto",
        help="auto takes CUDA where there is one",
    )
    return parser


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    from megatron_kd.data.preparation.selection import Rule, read_documents

    rule = Rule(arguments.keep_fraction, arguments.threshold, arguments.keep_tokens)
    _check_output(arguments.output)
    for name in ("batch_size", "shard_tokens", "sequence_length"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} ({value}) must be at least 1")
    index, description = read_documents(arguments.data)
    models = _models(arguments, description)
    length = arguments.sequence_length or _trained_length(models["teacher"][0])
    for name, (_, info) in models.items():
        window = info.model_section().window_problem(length)
        if window is not None:
            raise ConfigError(f"--{name}: --sequence-length {window}")
    return _score(arguments, rule, index, description, models, length)


def _check_output(output: Path) -> None:
    """Nothing is overwritten but what this tool left of an output that it did not finish: files without an index, beside its report."""
    there = [ending for ending in (".idx", ".bin", ".json") if Path(f"{output}{ending}").exists()]
    if there and (".idx" in there or not Path(f"{output}.selection.json").exists()):
        raise ConfigError(f"{output}{there[0]} is there already: choose another --output")


def _models(
    arguments: argparse.Namespace, description: dict[str, Any]
) -> dict[str, tuple[Path, Any]]:
    """Both checkpoints, with the data's vocabulary. ConfigError on every rank, before any collective."""
    from megatron_kd.checkpoint.store import find_checkpoint, read_info
    from megatron_kd.data.token_file_checks import check_token_file

    found = {}
    for name in ("teacher", "reference"):
        folder = find_checkpoint(getattr(arguments, name), what=f"--{name}")
        info = read_info(folder, what=f"--{name}")
        if info.tokenizer is not None and info.tokenizer != description["tokenizer_digest"]:
            raise ConfigError(
                f"--{name} was trained with another tokenizer than {arguments.data} was made with (digests {info.tokenizer} and "
                f"{description['tokenizer_digest']})"
            )
        found[name] = folder, info
    smallest = min(info.vocab_size for _, info in found.values())
    check_token_file(
        arguments.data, vocab_size=smallest, tokenizer_digest=description["tokenizer_digest"]
    )
    return found


def _trained_length(folder: Path) -> int:
    path = folder.parent.parent / "config.toml"
    content = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    length = content.get("batch", {}).get("sequence_length")
    if length is None:
        raise ConfigError(
            "--sequence-length is needed: the teacher's checkpoint is not in a run directory that says it"
        )
    return int(length)


def _score(
    arguments: argparse.Namespace,
    rule: Any,
    index: Any,
    description: dict[str, Any],
    models: dict[str, tuple[Path, Any]],
    length: int,
) -> dict[str, Any]:
    from megatron_kd.parallel.platform import start_platform

    _, world_size, local_rank = world_from_environment()
    platform = start_platform(arguments.device, local_rank)
    import torch.distributed as dist

    from megatron_kd.checkpoint.store import checkpoint_digest
    from megatron_kd.data.token_digests import token_ends_digest
    from megatron_kd.inference import document_scores as scoring
    from megatron_kd.inference.frozen_model import FrozenModel, inference_layout
    from megatron_kd.parallel.collectives import from_rank_zero
    from megatron_kd.parallel.groups import start_groups, stop_groups

    sizes = {"tensor": arguments.tensor, "pipeline": arguments.pipeline, "world_size": world_size}
    layouts = {name: inference_layout(info, **sizes) for name, (_, info) in models.items()}
    precision = arguments.precision or models["teacher"][1].precision
    folder = arguments.scores or Path(f"{arguments.output}.scores")
    shards = scoring.cut_shards(index.lengths.astype("int64"), arguments.shard_tokens)

    def begin() -> list[int]:
        digests = {name: checkpoint_digest(path) for name, (path, _) in models.items()}
        data = token_ends_digest(arguments.data)
        about = scoring.Scoring(
            data,
            **digests,
            sequence_length=length,
            shard_tokens=arguments.shard_tokens,
            precision=precision,
        )
        scoring.agree_on_scores(folder, about)
        return [
            number
            for number in range(len(shards))
            if not scoring.shard_path(folder, number).exists()
        ]

    try:
        groups = start_groups(platform, layouts["teacher"], timeout_seconds=_WAIT)
        missing = from_rank_zero(begin)
        if missing:
            built = {"precision": precision, "sequence_length": length}
            pair = tuple(
                FrozenModel(path, info, groups, layouts[name], **built)
                for name, (path, info) in models.items()
            )
            mine = missing[groups.data_rank :: groups.data_size]
            report = _Report(len(shards), len(shards) - len(missing), len(mine), groups)
            options = {
                "sequence_length": length,
                "batch_size": arguments.batch_size,
                "done": report,
            }
            scoring.score_shards(pair, arguments.data, index, shards, mine, folder, **options)
            report.close()
        dist.barrier()
        return from_rank_zero(
            lambda: _choose(
                arguments, rule, index, description, models, scoring.read_scores(folder, shards)
            )
        )
    finally:
        stop_groups()


class _Report:
    """Shards and tokens per second of the first replica."""

    def __init__(self, shards: int, finished: int, mine: int, groups: Any) -> None:
        from megatron_kd.telemetry.progress_bar import Progress

        self._progress = Progress(
            "auto", steps=mine, enabled=groups.reports_loss and groups.data_rank == 0
        )
        self._progress.message(
            f"{shards} shards, {finished} finished; {groups.data_size} replica(s) share the rest"
        )
        self._begin = time.perf_counter()

    def __call__(self, shards: int, tokens: int) -> None:
        self._progress.update(
            shards, tokens_per_second=tokens / (time.perf_counter() - self._begin)
        )

    def close(self) -> None:
        self._progress.close()


def _choose(
    arguments: argparse.Namespace,
    rule: Any,
    index: Any,
    description: dict[str, Any],
    models: dict[str, tuple[Path, Any]],
    scores: Any,
) -> dict[str, Any]:
    """Write the chosen documents and the report, on rank 0."""
    from dataclasses import asdict

    from megatron_kd.data.preparation.selection import choose, summary, write_chosen
    from megatron_kd.storage.atomic_files import write_atomically

    lengths = index.lengths.astype("int64")
    chosen = choose(scores, lengths, rule)
    found = {
        "data": str(Path(arguments.data).absolute()),
        **{name: str(path) for name, (path, _) in models.items()},
        "rule": {key: value for key, value in asdict(rule).items() if value is not None},
        **summary(scores, lengths, chosen),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        Path(f"{arguments.output}.selection.json"), (json.dumps(found, indent=2) + "\n").encode()
    )
    write_chosen(
        arguments.data, arguments.output, chosen, description, {"selection": found["rule"]}
    )
    return found


if __name__ == "__main__":
    sys.exit(main())
