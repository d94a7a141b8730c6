"""Check the inputs of a perplexity measurement before megatron-core is imported."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_kd.checkpoint.store import CheckpointInfo, find_checkpoint, read_info
from megatron_kd.config import ConfigError
from megatron_kd.data.token_file_checks import check_token_file
from megatron_kd.data.token_files import read_index
from megatron_kd.data.tokenizer import load_tokenizer


@dataclass(frozen=True)
class PerplexityInputs:
    """Hold the models and the data of a measurement.

    Attributes:
        folder: Folder of the checkpoint.
        info: Its description.
        teacher: Folder and description of the teacher's checkpoint; None without one.
        data: Name of each set -> prefix of its token file.
        sequence_length: Tokens of a sequence.
    """

    folder: Path
    info: CheckpointInfo
    teacher: tuple[Path, CheckpointInfo] | None
    data: dict[str, str]
    sequence_length: int


def find_perplexity_inputs(
    checkpoint: Path,
    *,
    teacher: Path | None,
    tokenizer: Path | None,
    data: dict[str, str],
    sequence_length: int | None,
) -> PerplexityInputs:
    """Find and check models and token files. No collective.

    Args:
        checkpoint: Run directory, its checkpoints folder, or a step-* folder.
        teacher: The same of a model to compare with, or None.
        tokenizer: The model's tokenizer; None for the one that the checkpoint names.
        data: Name of each set -> prefix; empty for data.valid of the checkpoint's run.
        sequence_length: Tokens of a sequence; None for that of the run.

    Raises:
        ConfigError: Something is missing, or does not fit the model.
    """
    folder = find_checkpoint(checkpoint, setting="checkpoint")
    info = read_info(folder, setting="checkpoint")
    run = _read_run_file(folder)
    teacher_checkpoint = None
    if teacher is not None:
        teacher_folder = find_checkpoint(teacher, setting="--teacher")
        teacher_checkpoint = teacher_folder, read_info(teacher_folder, setting="--teacher")
    data = data or dict(run.get("data", {}).get("valid", {}))
    if sequence_length is None:
        sequence_length = run.get("batch", {}).get("sequence_length")
    if not data or sequence_length is None:
        raise ConfigError(
            "--data NAME=PREFIX and --sequence-length are needed: the checkpoint is not in a run "
            "directory that names them"
        )
    inputs = PerplexityInputs(folder, info, teacher_checkpoint, data, sequence_length)
    _check_data(inputs, _tokenizer_digest(info, tokenizer))
    _check_teacher(inputs)
    return inputs


def _read_run_file(folder: Path) -> dict[str, Any]:
    path = folder.parent.parent / "config.toml"
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _tokenizer_digest(info: CheckpointInfo, tokenizer: Path | None) -> str | None:
    """Return the digest that the data's tokenizer must have; None if it is unknown."""
    if tokenizer is None:
        return info.tokenizer
    digest = load_tokenizer(tokenizer)[1].digest
    if info.tokenizer is not None and digest != info.tokenizer:
        raise ConfigError(
            f"--tokenizer {tokenizer} is not the one the model was trained with (digests {digest} "
            f"and {info.tokenizer})"
        )
    return digest


def _check_data(inputs: PerplexityInputs, digest: str | None) -> None:
    """Check that each file is complete, fits the model and holds at least one sequence."""
    info, length = inputs.info, inputs.sequence_length
    if length < 1:
        raise ConfigError(f"--sequence-length ({length}) must be at least 1")
    problem = info.model_section().window_problem(length)
    if problem is not None:
        raise ConfigError(f"--sequence-length {problem}")
    for prefix in inputs.data.values():
        check_token_file(prefix, vocab_size=info.vocab_size, tokenizer_digest=digest)
        num_tokens = read_index(prefix).num_tokens
        if num_tokens < length + 1:
            raise ConfigError(
                f"{prefix} holds {num_tokens} tokens, fewer than one sequence of {length + 1}"
            )


def _check_teacher(inputs: PerplexityInputs) -> None:
    """Check that both models have one vocabulary, and the teacher a window for the sequences."""
    if inputs.teacher is None:
        return
    info, teacher = inputs.info, inputs.teacher[1]
    if teacher.vocab_size != info.vocab_size or (
        None not in (teacher.tokenizer, info.tokenizer) and teacher.tokenizer != info.tokenizer
    ):
        raise ConfigError(
            f"--teacher has another vocabulary ({teacher.vocab_size} ids, tokenizer "
            f"{teacher.tokenizer}) than the model ({info.vocab_size} ids, tokenizer "
            f"{info.tokenizer}): their distributions cannot be compared"
        )
    problem = teacher.model_section().window_problem(inputs.sequence_length)
    if problem is not None:
        raise ConfigError(f"--teacher: --sequence-length {problem}")
