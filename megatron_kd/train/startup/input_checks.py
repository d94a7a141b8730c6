"""What can be known to be wrong before ranks talk to each other, or torch is imported: each rank finds it by itself."""

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
    check_same_vocabulary,
    complete_steps,
    find_checkpoint,
    has_digests,
    read_info,
    step_folder,
)
from megatron_kd.config import ConfigError, ModelSection, RunConfig
from megatron_kd.config.hidden_state_pairs import Projection, projections_of
from megatron_kd.data.token_file_checks import check_token_file
from megatron_kd.data.token_files import packed_length, read_index
from megatron_kd.data.tokenizer import TokenizerInfo, load_tokenizer
from megatron_kd.storage.directory_lock import lock_conflict
from megatron_kd.teacher.huggingface_folder import check_huggingface_teacher, known_shape


@dataclass(frozen=True)
class Inputs:
    """What the checks before the first collective have found.

    skipped_checkpoints: (step, what is wrong) of damaged checkpoints newer than `resume`, found out by all ranks together.
    settings: what decides the weights (train/startup/run_fingerprint.py). changed_settings: in words, what of it is another than in `resume`.
    """

    vocab_size: int
    tokenizer: TokenizerInfo | None
    teacher: tuple[Path, CheckpointInfo] | None
    resume: tuple[Path, CheckpointInfo] | None
    initial: Path | None
    huggingface: Path | None = None
    projections: tuple[Projection, ...] = ()
    skipped_checkpoints: tuple[tuple[int, str], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    changed_settings: tuple[str, ...] = ()

    @property
    def teacher_model(self) -> ModelSection | None:
        """Shape of the teacher; None without one, and for one that is not of a family known here."""
        if self.huggingface is not None:
            return known_shape(self.huggingface)
        return self.teacher[1].model_section() if self.teacher is not None else None

    @property
    def digest(self) -> str | None:
        """Digest of the tokenizer's vocabulary."""
        return self.tokenizer.digest if self.tokenizer else None


def checkpoints_folder(config: RunConfig) -> Path:
    """Where this run's checkpoints are."""
    return config.run.directory / "checkpoints"


def check_inputs(config: RunConfig, *, world_size: int) -> Inputs:
    """Check sizes, tokenizer, data and checkpoints. ConfigError with one sentence, the same on every rank; no collective."""
    config.data_parallel_size(world_size)
    held = lock_conflict(config.run.directory, report=_say)
    if held is not None:
        raise ConfigError(held)
    tokenizer = None
    if config.data.tokenizer:
        tokenizer = load_tokenizer(
            config.data.tokenizer, end_of_document=config.data.end_of_document
        )[1]
    vocab_size = config.model.vocab_size or (tokenizer.vocab_size if tokenizer else 0)
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size ({vocab_size}) is smaller than the vocabulary of data.tokenizer ({tokenizer.vocab_size} ids)"
        )
    if (
        (config.teacher.enabled or config.capture.directory is not None)
        and config.distill.num_draws is None
        and not config.distill.dense
        and config.distill.top_k > vocab_size
    ):
        raise ConfigError(
            f"distill.top_k ({config.distill.top_k}) must be at most the vocabulary size ({vocab_size})"
        )
    digest = tokenizer.digest if tokenizer else None
    for prefix in (*config.data.train, *config.data.valid.values()):
        check_token_file(prefix, vocab_size=vocab_size, tokenizer_digest=digest)
        if read_index(prefix).num_tokens < config.batch.sequence_length + 1:
            raise ConfigError(
                f"{prefix} holds {read_index(prefix).num_tokens} tokens, fewer than one sequence of batch.sequence_length + 1 = "
                f"{config.batch.sequence_length + 1}: use more data or a shorter sequence"
            )
        _check_packed(config, prefix)
    teacher = huggingface = None
    if config.teacher.source == "huggingface":
        huggingface = check_huggingface_teacher(config, vocab_size=vocab_size, digest=digest)
    elif config.teacher.enabled and config.teacher.checkpoint is not None:
        teacher = _check_teacher(config, config.teacher.checkpoint, vocab_size, digest, world_size)
    projections = (
        projections_of(config.distill.hidden_states, config.model, teacher[1].model_section())
        if teacher is not None
        else ()
    )
    resume = _checkpoint_to_resume(config, vocab_size, digest, projections)
    initial = None
    if resume is None and config.checkpoint.initialize_from is not None:
        initial = find_checkpoint(
            config.checkpoint.initialize_from, what="checkpoint.initialize_from"
        )
        info = read_info(initial, what="checkpoint.initialize_from")
        check_same_model(
            info,
            config.model,
            vocab_size=vocab_size,
            tokenizer=digest,
            folder=initial,
            what="checkpoint.initialize_from",
        )
    return Inputs(vocab_size, tokenizer, teacher, resume, initial, huggingface, projections)


def _say(sentence: str) -> None:
    print(f"megatron_kd: {sentence}", file=sys.stderr, flush=True)


def _check_teacher(
    config: RunConfig, path: Path, vocab_size: int, digest: str | None, world_size: int
) -> tuple[Path, CheckpointInfo]:
    """The teacher's checkpoint; ConfigError where it does not fit this run."""
    folder = find_checkpoint(path, what="teacher.checkpoint")
    info = read_info(folder, what="teacher.checkpoint")
    model = info.model_section()
    check_same_vocabulary(
        info, vocab_size=vocab_size, tokenizer=digest, folder=folder, what="teacher.checkpoint"
    )
    _check_teacher_layout(config, model, folder, world_size)
    window = model.window_problem(config.batch.sequence_length)
    if window is not None:
        raise ConfigError(f"teacher.checkpoint: {folder}: batch.sequence_length {window}")
    for pair in config.distill.hidden_states:
        if pair.teacher_layer > model.num_layers:
            raise ConfigError(
                f"distill.hidden_states names teacher_layer {pair.teacher_layer}, but the teacher {folder} has {model.num_layers} layers"
            )
    return folder, info


def _check_teacher_layout(
    config: RunConfig, model: ModelSection, folder: Path, world_size: int
) -> None:
    """ConfigError where the teacher cannot be cut as the run file says: by its own sizes, or by the student's."""
    if config.teacher.reads_cache and not config.teacher.falls_back:
        return
    problem = config.teacher_problem(model, world_size)
    if problem is not None:
        raise ConfigError(f"teacher.checkpoint: {folder} has {problem}")


def _check_packed(config: RunConfig, prefix: str) -> None:
    """ConfigError where packed conversations would be cut apart, or would see each other."""
    length = packed_length(prefix)
    if length is not None and length != config.batch.sequence_length:
        raise ConfigError(
            f"{prefix} holds conversations packed into samples of {length} tokens: set batch.sequence_length to that, or make it again "
            f"with --sequence-length {config.batch.sequence_length}"
        )
    if length is not None and config.data.document_attention != "within":
        raise ConfigError(
            f'{prefix} holds several conversations in each sample: set data.document_attention = "within"'
        )


def _checkpoint_to_resume(
    config: RunConfig, vocab_size: int, digest: str | None, projections: tuple[Projection, ...]
) -> tuple[Path, CheckpointInfo] | None:
    """The newest checkpoint that can be told what it is; whether its files are sound is found out together (train/startup/resume.py)."""
    steps = complete_steps(checkpoints_folder(config))
    if not steps:
        return None
    if not config.checkpoint.resume:
        raise ConfigError(
            f"run.directory {config.run.directory} already holds a checkpoint of step {steps[-1]}: "
            "choose another directory, or set checkpoint.resume = true to continue it"
        )
    problems = []
    for step in reversed(steps):
        folder = step_folder(checkpoints_folder(config), step)
        try:
            info = read_info(folder, what="run.directory")
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
    """ConfigError where the run cannot go on from this checkpoint."""
    check_same_model(
        info,
        config.model,
        vocab_size=vocab_size,
        tokenizer=digest,
        folder=folder,
        what="run.directory",
    )
    if info.distributed_optimizer != config.optimizer.distributed:
        raise ConfigError(
            f"run.directory: {folder} was saved with optimizer.distributed = {str(info.distributed_optimizer).lower()}: "
            "continue with the same"
        )
    if info.hidden_projections != [list(each) for each in projections]:
        raise ConfigError(
            f"run.directory: {folder} trains projections of {_layers(info.hidden_projections)}, this run of {_layers(projections)}: "
            "continue with the same pairs in distill.hidden_states and the same teacher, or start a new run with checkpoint.initialize_from"
        )


def _layers(projections: Iterable[Iterable[int]]) -> str:
    """Pairs of layers in words."""
    named = [
        f"layer {student} to the teacher's {teacher} (width {width})"
        for student, teacher, width in projections
    ]
    return ", ".join(named) or "no layer"
