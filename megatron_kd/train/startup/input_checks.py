"""Check a run's inputs before ranks communicate and before torch is imported.

Each rank checks by itself, and finds the same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_kd.checkpoint.manifest import file_problem
from megatron_kd.checkpoint.store import (
    CheckpointInfo,
    check_same_model,
    complete_steps,
    find_checkpoint,
    has_digests,
    read_info,
    step_folder,
)
from megatron_kd.config import ConfigError, RunConfig
from megatron_kd.config.hidden_state_pairs import Projection, projections_of
from megatron_kd.data.token_file_checks import check_token_file
from megatron_kd.data.token_files import packed_length, read_index
from megatron_kd.data.tokenizer import TokenizerInfo, load_tokenizer
from megatron_kd.storage.directory_lock import lock_conflict
from megatron_kd.teacher.source import TeacherInputs, teacher_source

_INITIAL = "checkpoint.initialize_from"


@dataclass(frozen=True)
class Inputs:
    """Hold what the checks before the first collective have read.

    Attributes:
        vocab_size: true number of ids.
        tokenizer: of data.tokenizer; None without one.
        teacher: the teacher's checked inputs.
        resume: folder and description of the checkpoint that the run continues.
        initial: folder of the checkpoint that a new run starts from.
        projections: trained between layers of different widths (distill.hidden_states).
        skipped_checkpoints: (step, problem) of those newer than `resume`, which all ranks have
            found together.
        settings: what decides the weights (train/startup/run_fingerprint.py).
        changed_settings: sentences about settings that differ from those of `resume`.
    """

    vocab_size: int
    tokenizer: TokenizerInfo | None
    teacher: TeacherInputs
    resume: tuple[Path, CheckpointInfo] | None
    initial: Path | None
    projections: tuple[Projection, ...] = ()
    skipped_checkpoints: tuple[tuple[int, str], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    changed_settings: tuple[str, ...] = ()

    @property
    def digest(self) -> str | None:
        """Return the digest of the tokenizer's vocabulary; None without a tokenizer."""
        return self.tokenizer.digest if self.tokenizer else None


def checkpoints_folder(config: RunConfig) -> Path:
    """Return the folder of this run's checkpoints."""
    return config.run.directory / "checkpoints"


def check_inputs(config: RunConfig, *, world_size: int) -> Inputs:
    """Check sizes, tokenizer, data, teacher and checkpoints. No collective.

    Raises:
        ConfigError: with one sentence, the same on every rank.
    """
    config.data_parallel_size(world_size)
    conflict = lock_conflict(config.run.directory, report=_print)
    if conflict is not None:
        raise ConfigError(conflict)
    tokenizer, vocab_size = _check_vocabulary(config)
    digest = tokenizer.digest if tokenizer else None
    for prefix in (*config.data.train, *config.data.valid.values()):
        _check_data(config, prefix, vocab_size, digest)
    teacher = teacher_source(config).check_inputs(vocab_size, digest, world_size)
    projections: tuple[Projection, ...] = ()
    if teacher.model is not None:
        projections = projections_of(config.distill.hidden_states, config.model, teacher.model)
    resume = _checkpoint_to_resume(config, vocab_size, digest, projections)
    initial = None if resume is not None else _initial_checkpoint(config, vocab_size, digest)
    return Inputs(vocab_size, tokenizer, teacher, resume, initial, projections)


def _print(message: str) -> None:
    print(f"megatron_kd: {message}", file=sys.stderr, flush=True)


def _check_vocabulary(config: RunConfig) -> tuple[TokenizerInfo | None, int]:
    """Return the tokenizer, if there is one, and the vocabulary size."""
    tokenizer = None
    if config.data.tokenizer:
        tokenizer = load_tokenizer(
            config.data.tokenizer, end_of_document=config.data.end_of_document
        )[1]
    vocab_size = config.model.vocab_size or (tokenizer.vocab_size if tokenizer else 0)
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size ({vocab_size}) is smaller than the vocabulary of data.tokenizer "
            f"({tokenizer.vocab_size} ids)"
        )
    distill = config.distill
    needs_targets = config.teacher.enabled or config.capture.directory is not None
    uses_top_k = needs_targets and distill.num_draws is None and not distill.dense
    if uses_top_k and distill.top_k > vocab_size:
        raise ConfigError(
            f"distill.top_k ({distill.top_k}) must be at most the vocabulary size ({vocab_size})"
        )
    return tokenizer, vocab_size


def _check_data(config: RunConfig, prefix: str, vocab_size: int, digest: str | None) -> None:
    """Raise ConfigError if a token file does not suit this run."""
    check_token_file(prefix, vocab_size=vocab_size, tokenizer_digest=digest)
    tokens, needed = read_index(prefix).num_tokens, config.batch.sequence_length + 1
    if tokens < needed:
        raise ConfigError(
            f"{prefix} holds {tokens} tokens, fewer than one sequence of "
            f"batch.sequence_length + 1 = {needed}: use more data or a shorter sequence"
        )
    _check_packed(config, prefix)


def _check_packed(config: RunConfig, prefix: str) -> None:
    """Raise ConfigError if packed conversations would be cut apart, or would see each other."""
    length = packed_length(prefix)
    if length is not None and length != config.batch.sequence_length:
        raise ConfigError(
            f"{prefix} holds conversations packed into samples of {length} tokens: set "
            "batch.sequence_length to that, or make it again with --sequence-length "
            f"{config.batch.sequence_length}"
        )
    if length is not None and config.data.document_attention != "within":
        raise ConfigError(
            f"{prefix} holds several conversations in each sample: set "
            'data.document_attention = "within"'
        )


def _initial_checkpoint(config: RunConfig, vocab_size: int, digest: str | None) -> Path | None:
    """Return the checkpoint that a new run starts from, if it names one."""
    if config.checkpoint.initialize_from is None:
        return None
    folder = find_checkpoint(config.checkpoint.initialize_from, setting=_INITIAL)
    check_same_model(
        read_info(folder, setting=_INITIAL),
        config.model,
        vocab_size=vocab_size,
        tokenizer=digest,
        folder=folder,
        setting=_INITIAL,
    )
    return folder


def _checkpoint_to_resume(
    config: RunConfig, vocab_size: int, digest: str | None, projections: tuple[Projection, ...]
) -> tuple[Path, CheckpointInfo] | None:
    """Return the newest checkpoint that can be identified.

    Whether its files are valid is found out by all ranks together (train/startup/resume.py).
    """
    steps = complete_steps(checkpoints_folder(config))
    if not steps:
        return None
    if not config.checkpoint.resume:
        raise ConfigError(
            f"run.directory {config.run.directory} already holds a checkpoint of step "
            f"{steps[-1]}: choose another directory, or set checkpoint.resume = true to continue it"
        )
    problems = []
    for step in reversed(steps):
        folder = step_folder(checkpoints_folder(config), step)
        try:
            info = read_info(folder, setting="run.directory")
        except ConfigError as error:
            problems.append(str(error))
            continue
        # Else damage to state.json would look like a run file that has changed.
        damage = file_problem(folder, "state.json") if has_digests(folder, info) else None
        if damage is not None:
            problems.append(f"run.directory: {damage}")
            continue
        check_resume(
            config, folder, info, vocab_size=vocab_size, digest=digest, projections=projections
        )
        return folder, info
    raise ConfigError("; ".join(problems))


def check_resume(
    config: RunConfig,
    folder: Path,
    info: CheckpointInfo,
    *,
    vocab_size: int,
    digest: str | None,
    projections: tuple[Projection, ...],
) -> None:
    """Check that the run can continue a checkpoint.

    Args:
        config: the run.
        folder: of the checkpoint.
        info: its description.
        vocab_size: true number of ids of the run.
        digest: of the run's vocabulary; None without a tokenizer.
        projections: that the run trains.

    Raises:
        ConfigError: it cannot.
    """
    check_same_model(
        info,
        config.model,
        vocab_size=vocab_size,
        tokenizer=digest,
        folder=folder,
        setting="run.directory",
    )
    if info.distributed_optimizer != config.optimizer.distributed:
        raise ConfigError(
            f"run.directory: {folder} was saved with optimizer.distributed = "
            f"{str(info.distributed_optimizer).lower()}: continue with the same"
        )
    if info.hidden_projections != [list(projection) for projection in projections]:
        raise ConfigError(
            f"run.directory: {folder} trains projections of "
            f"{_describe_projections(info.hidden_projections)}, this run of "
            f"{_describe_projections(projections)}: continue with the same pairs in "
            "distill.hidden_states and the same teacher, or start a new run with "
            "checkpoint.initialize_from"
        )


def _describe_projections(projections: Iterable[Iterable[int]]) -> str:
    """Return pairs of layers in words."""
    pairs = [
        f"layer {student} to the teacher's {teacher} (width {width})"
        for student, teacher, width in projections
    ]
    return ", ".join(pairs) or "no layer"
