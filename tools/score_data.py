r"""Keep the documents that a teacher finds much more probable than a small reference model does.

    python tools/score_data.py --data data/train --teacher runs/teacher --reference runs/small \
        --keep-fraction 0.5 --output data/chosen
    torchrun --nproc-per-node 8 tools/score_data.py --data data/train --teacher teachers/8b \
        --reference runs/small --tensor 4 --sequence-length 2048 --keep-tokens 50000000000 \
        --output data/chosen

This is difference sampling (arXiv 2410.17215). The score of a document is the mean over its tokens
but the first of log p_teacher - log p_reference, in nats. Documents longer than --sequence-length
are cut into windows that see nothing before them; documents never see each other. The documents
kept are written unchanged and in order as OUTPUT.bin, .idx and .json, with the tokenizer's digest.
OUTPUT.selection.json states how scores are distributed and what was kept. Both models must have
been trained with the data's tokenizer; they may be converted ones.

Scores are kept in --scores, shard by shard. The same command, run again, continues after a kill,
and another --output with another rule reads them. Exit codes: 0 done, 1 a failure, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_kd.config import ConfigError
from megatron_kd.parallel.world import world_from_environment
from megatron_kd.storage.exit_codes import BAD_INPUT

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from megatron_kd.data.preparation.selection import SelectionRule
    from megatron_kd.inference.document_scores import ScoringJob
    from megatron_kd.inference.frozen_model import FrozenModel
    from megatron_kd.parallel.groups import Groups

_TIMEOUT_SECONDS = 4 * 3600  # finished ranks wait this long for the last shard of others


@dataclass(frozen=True)
class ScoringModels:
    """Hold the checkpoint folder and the info of both models by role, and the window length."""

    checkpoints: dict[str, tuple[Path, Any]]
    sequence_length: int

    @property
    def paths(self) -> dict[str, str]:
        """Checkpoint folder of each model."""
        return {name: str(path) for name, (path, _) in self.checkpoints.items()}


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments, score the documents, and write those that are kept."""
    arguments = _parser().parse_args(argv)
    try:
        report = _run(arguments)
        if world_from_environment()[0] == 0:
            print(json.dumps(report, indent=2))
        return 0
    except ConfigError as error:
        print(f"score_data: error: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT
    except OSError as error:
        message = f"score_data: {error}: finished shards are kept; start again"
        print(message, file=sys.stderr, flush=True)
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
    _add_model_options(parser)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
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


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    from megatron_kd.data.preparation.selection import (
        SelectionRule,
        check_selection_output,
        read_documents,
    )

    rule = SelectionRule(arguments.keep_fraction, arguments.threshold, arguments.keep_tokens)
    check_selection_output(arguments.output)
    for name in ("batch_size", "shard_tokens", "sequence_length"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} ({value}) must be at least 1")
    _, description = read_documents(arguments.data)
    models = _find_models(arguments, description)
    return _score(arguments, rule, models)


def _find_models(arguments: argparse.Namespace, description: dict[str, Any]) -> ScoringModels:
    """Check both checkpoints against the data.

    Raises:
        ConfigError: on every rank, before any collective.
    """
    from megatron_kd.checkpoint.store import find_checkpoint, read_info
    from megatron_kd.data.token_file_checks import check_token_file

    digest = description["tokenizer_digest"]
    checkpoints = {}
    for name in ("teacher", "reference"):
        folder = find_checkpoint(getattr(arguments, name), setting=f"--{name}")
        info = read_info(folder, setting=f"--{name}")
        if info.tokenizer is not None and info.tokenizer != digest:
            raise ConfigError(
                f"--{name} was trained with another tokenizer than {arguments.data} was made with "
                f"(digests {info.tokenizer} and {digest})"
            )
        checkpoints[name] = folder, info
    smallest = min(info.vocab_size for _, info in checkpoints.values())
    check_token_file(arguments.data, vocab_size=smallest, tokenizer_digest=digest)
    length = arguments.sequence_length or _trained_length(checkpoints["teacher"][0])
    for name, (_, info) in checkpoints.items():
        problem = info.model_section().window_problem(length)
        if problem is not None:
            raise ConfigError(f"--{name}: --sequence-length {problem}")
    return ScoringModels(checkpoints, length)


def _trained_length(folder: Path) -> int:
    path = folder.parent.parent / "config.toml"
    content = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    length = content.get("batch", {}).get("sequence_length")
    if length is None:
        raise ConfigError(
            "--sequence-length is needed: "
            "the teacher's checkpoint is not in a run directory that states it"
        )
    return int(length)


def _score(
    arguments: argparse.Namespace, rule: SelectionRule, models: ScoringModels
) -> dict[str, Any]:
    """Score the shards that are missing, then write the selection on rank 0. Collective."""
    from megatron_kd.parallel.platform import start_platform

    _, world_size, local_rank = world_from_environment()
    platform = start_platform(arguments.device, local_rank)
    import torch.distributed as dist

    from megatron_kd.data.token_files import read_index
    from megatron_kd.inference import document_scores as scoring
    from megatron_kd.inference.frozen_model import FrozenModel, inference_layout
    from megatron_kd.parallel.collectives import from_rank_zero
    from megatron_kd.parallel.groups import start_groups, stop_groups

    sizes = {"tensor": arguments.tensor, "pipeline": arguments.pipeline, "world_size": world_size}
    checkpoints = models.checkpoints
    layouts = {name: inference_layout(info, **sizes) for name, (_, info) in checkpoints.items()}
    precision = arguments.precision or checkpoints["teacher"][1].precision
    folder = arguments.scores or Path(f"{arguments.output}.scores")
    index = read_index(arguments.data)
    shards = scoring.cut_shards(index.lengths.astype("int64"), arguments.shard_tokens)
    try:
        groups = start_groups(platform, layouts["teacher"], timeout_seconds=_TIMEOUT_SECONDS)
        missing = from_rank_zero(
            lambda: _missing_shards(arguments, models, precision, folder, len(shards))
        )
        if missing:
            job = scoring.ScoringJob(
                arguments.data,
                index,
                shards,
                folder,
                models.sequence_length,
                arguments.batch_size,
            )
            options = {"precision": precision, "sequence_length": models.sequence_length}
            pair = tuple(
                FrozenModel(path, info, groups, layouts[name], **options)
                for name, (path, info) in checkpoints.items()
            )
            _score_missing(pair, job, missing, groups)
        dist.barrier()
        return from_rank_zero(
            lambda: _write_selection(
                arguments, rule, models.paths, scoring.read_scores(folder, shards)
            )
        )
    finally:
        stop_groups()


def _write_selection(
    arguments: argparse.Namespace,
    rule: SelectionRule,
    paths: dict[str, str],
    scores: NDArray[np.float64],
) -> dict[str, Any]:
    from megatron_kd.data.preparation.selection import write_selection

    return write_selection(Path(arguments.data), arguments.output, scores, rule, paths)


def _score_missing(
    pair: tuple[FrozenModel, ...], job: ScoringJob, missing: list[int], groups: Groups
) -> None:
    """Score this replica's part of the missing shards."""
    from megatron_kd.inference.document_scores import score_shards

    numbers = missing[groups.data_rank :: groups.data_size]
    progress = ShardProgress(len(job.shards), len(missing), len(numbers), groups)
    for num_shards, num_tokens in score_shards(pair, job, numbers):
        progress.update(num_shards, num_tokens)
    progress.close()


def _missing_shards(
    arguments: argparse.Namespace,
    models: ScoringModels,
    precision: str,
    folder: Path,
    num_shards: int,
) -> list[int]:
    """Check that the folder holds scores of this very job and return the shards to score."""
    from megatron_kd.checkpoint.store import checkpoint_digest
    from megatron_kd.data.token_digests import token_ends_digest
    from megatron_kd.inference import document_scores as scoring

    digests = {name: checkpoint_digest(path) for name, (path, _) in models.checkpoints.items()}
    identity = scoring.Scoring(
        token_ends_digest(arguments.data),
        **digests,
        sequence_length=models.sequence_length,
        shard_tokens=arguments.shard_tokens,
        precision=precision,
    )
    scoring.record_scoring(folder, identity)
    return [n for n in range(num_shards) if not scoring.shard_path(folder, n).exists()]


class ShardProgress:
    """Show shards and tokens per second of the first replica."""

    def __init__(self, shards: int, missing: int, steps: int, groups: Groups) -> None:
        from megatron_kd.telemetry.progress_bar import ProgressBar

        self._progress = ProgressBar(
            "auto", steps=steps, enabled=groups.reports_loss and groups.data_rank == 0
        )
        self._progress.message(
            f"{shards} shards, {shards - missing} finished; "
            f"{groups.data_size} replica(s) share the rest"
        )
        self._start = time.perf_counter()

    def update(self, shards: int, tokens: int) -> None:
        """Count finished shards and tokens."""
        self._progress.update(
            shards, tokens_per_second=tokens / (time.perf_counter() - self._start)
        )

    def close(self) -> None:
        """Close the bar."""
        self._progress.close()


if __name__ == "__main__":
    sys.exit(main())
