"""Keep checkpoints as folders: `<run>/checkpoints/step-00000020`, complete or absent.

A checkpoint is written under a hidden name, its digests with it (`manifest.py`), made durable, and
renamed: the rename is the commit. `state.json` beside megatron-core's files describes the weights;
it is plain JSON and is read before any other file is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_kd.checkpoint.manifest import (
    COMMIT,
    MANIFEST,
    FileRecord,
    seal,
    summarize_problems,
    verify,
    write_file,
)
from megatron_kd.config import ConfigError, ModelSection
from megatron_kd.storage.atomic_files import file_digest, sync_path

FORMAT = 2  # Format 1 had no digests.
_STEP = re.compile(r"step-(\d{8})")

# Keys that decide whether weights fit; the rest of the model section may change between runs.
_SHAPE: tuple[str, ...] = (
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "num_query_groups",
    "head_dim",
    "ffn_hidden_size",
    "vocab_size_multiple",
)
_SHAPE += (
    "tied_embeddings",
    "qk_norm",
    "qkv_bias",
    "norm_eps",
    "rope_base",
    "rope_scaling_factor",
    "rope_low_frequency_factor",
)
_SHAPE += ("rope_high_frequency_factor", "rope_original_length", "sliding_window")


@dataclass(frozen=True)
class CheckpointInfo:
    """Hold the content of state.json.

    Attributes:
        step: finished updates; the counters are as of this step.
        consumed_samples: samples that the updates used.
        consumed_tokens: tokens that the updates used.
        nonfinite_steps: updates that were skipped for a gradient norm that is not finite.
        model: the model section.
        vocab_size: true number of ids.
        tokenizer: digest of the vocabulary, or None.
        precision: of the weights, "fp32" or "bf16".
        distributed_optimizer: which form the optimizer state has; None for weights alone.
        version: of this package.
        hidden_projections: [student layer, teacher layer, teacher's width] of each projection that
            is trained with the student.
        settings: further settings that decide the run's weights, by key; empty for weights alone.
        format: of the checkpoint.
    """

    step: int
    consumed_samples: int
    consumed_tokens: int
    nonfinite_steps: int
    model: dict[str, Any]
    vocab_size: int
    tokenizer: str | None
    precision: str
    distributed_optimizer: bool | None
    version: str
    hidden_projections: list[list[int]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def model_section(self) -> ModelSection:
        """Return the validated model section."""
        return ModelSection.model_validate(self.model)


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder that the complete checkpoint of `step` has."""
    return checkpoints / f"step-{step:08d}"


def complete_steps(checkpoints: Path) -> list[int]:
    """Return the steps with a complete checkpoint in this folder, oldest first."""
    if not checkpoints.is_dir():
        return []
    names = (_STEP.fullmatch(entry.name) for entry in checkpoints.iterdir() if entry.is_dir())
    return sorted(int(match.group(1)) for match in names if match)


def find_checkpoint(path: Path, *, setting: str) -> Path:
    """Return the newest complete checkpoint at `path`.

    Args:
        path: a run directory, its checkpoints folder or one step folder.
        setting: the run-file key that an error names.

    Raises:
        ConfigError: there is no checkpoint.
    """
    if (path / "state.json").is_file():
        return path
    for folder in (path / "checkpoints", path):
        steps = complete_steps(folder)
        if steps:
            return step_folder(folder, steps[-1])
    raise ConfigError(
        f"{setting}: no checkpoint at {path} "
        "(expected a run directory, its checkpoints folder, or a step-* folder)"
    )


def read_info(folder: Path, *, setting: str) -> CheckpointInfo:
    """Return state.json of a checkpoint; raise ConfigError where it is invalid."""
    try:
        content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        version = content["format"]
        if version not in range(1, FORMAT + 1):
            raise ConfigError(
                f"{setting}: {folder} has checkpoint format {version}, this version reads formats "
                f"1 to {FORMAT}"
            )
        return CheckpointInfo(**content)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{setting}: {folder / 'state.json'} cannot be read ({error})") from error


def check_digests(folder: Path, info: CheckpointInfo, *, setting: str) -> None:
    """Raise ConfigError where a file of the checkpoint is damaged. Reads all; no collective."""
    problems = verify(folder) if has_digests(folder, info) else []
    if problems:
        raise ConfigError(f"{setting}: {damage_message(problems)}")


def has_digests(folder: Path, info: CheckpointInfo) -> bool:
    """Return True if a checkpoint can be verified.

    The format in state.json is not sufficient: that file may be the damaged one.
    """
    return info.format > 1 or any((folder / name).exists() for name in (MANIFEST, COMMIT))


def damage_message(problems: Iterable[str]) -> str:
    """Return one sentence about the damaged files."""
    summary = summarize_problems(problems)
    return f"{summary}: the checkpoint is damaged, use another copy or another step"


def check_same_model(
    info: CheckpointInfo,
    model: ModelSection,
    *,
    vocab_size: int,
    tokenizer: str | None,
    folder: Path,
    setting: str,
) -> None:
    """Raise ConfigError unless the checkpoint holds this model: shape, vocabulary and tokenizer.

    Args:
        info: content of the checkpoint's state.json.
        model: the run's model section.
        vocab_size: the run's true number of ids.
        tokenizer: digest of the run's vocabulary, or None.
        folder: of the checkpoint.
        setting: the run-file key that an error names.
    """
    saved_model = info.model_section()
    for name in _SHAPE:
        current, saved = _effective(model, name), _effective(saved_model, name)
        if current != saved:
            raise ConfigError(
                f"{setting}: {folder} holds another model: "
                f"model.{name} is {saved} there and {current} here"
            )
    check_same_vocabulary(
        info, vocab_size=vocab_size, tokenizer=tokenizer, folder=folder, setting=setting
    )


def check_same_vocabulary(
    info: CheckpointInfo, *, vocab_size: int, tokenizer: str | None, folder: Path, setting: str
) -> None:
    """Raise ConfigError unless the checkpoint's ids mean the same as this run's.

    Args:
        info: content of the checkpoint's state.json.
        vocab_size: the run's true number of ids.
        tokenizer: digest of the run's vocabulary, or None.
        folder: of the checkpoint.
        setting: the run-file key that an error names.
    """
    if info.vocab_size != vocab_size:
        raise ConfigError(
            f"{setting}: {folder} has a vocabulary of {info.vocab_size} ids, this run has "
            f"{vocab_size}: use the same tokenizer"
        )
    if info.tokenizer is not None and tokenizer is not None and info.tokenizer != tokenizer:
        raise ConfigError(
            f"{setting}: {folder} was made with another tokenizer (digest {info.tokenizer}, this "
            f"run's is {tokenizer})"
        )


def _effective(model: ModelSection, name: str) -> Any:
    if name == "num_query_groups":
        return model.num_query_groups or model.num_attention_heads
    if name == "head_dim":
        return model.head_dim or model.hidden_size // model.num_attention_heads
    return getattr(model, name)


class CheckpointError(RuntimeError):
    """Report a checkpoint that could not be written, or does not read back.

    Earlier checkpoints are untouched.
    """


class PendingCheckpoint:
    """Hold a checkpoint that is being written: a hidden folder until `commit`.

    For one rank only.
    """

    def __init__(self, checkpoints: Path, step: int) -> None:
        self.final = step_folder(checkpoints, step)
        self.folder = checkpoints / f".incomplete-{self.final.name}"

    def start(self) -> None:
        """Create an empty folder, removing what an interrupted save has left."""
        self.discard()
        self.folder.mkdir(parents=True)

    def discard(self) -> None:
        """Remove the folder, as far as the disk permits."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def commit(
        self, info: CheckpointInfo, files: Mapping[str, FileRecord]
    ) -> dict[str, FileRecord]:
        """Write state.json, the manifest and its mark, and give the folder its name.

        Args:
            info: content of state.json.
            files: records of all other files, which are durable.

        Returns:
            The records of all files.
        """
        data = (json.dumps(asdict(info), indent=2) + "\n").encode()
        records = {**files, "state.json": write_file(self.folder, "state.json", data)}
        seal(self.folder, records)
        replaced = self.final.exists()
        if replaced:
            _hide(self.final)
        os.replace(self.folder, self.final)
        sync_path(self.final.parent)
        if replaced:
            shutil.rmtree(_hidden(self.final), ignore_errors=True)
        return records


def _hidden(folder: Path) -> Path:
    return folder.with_name(f".removed-{folder.name}")


def _hide(folder: Path) -> None:
    """Rename a checkpoint before it is removed file by file."""
    shutil.rmtree(_hidden(folder), ignore_errors=True)
    os.replace(folder, _hidden(folder))


def remove_leftovers(checkpoints: Path) -> None:
    """Remove what killed saves and removals have left.

    For a run that has the directory's lock and saves nothing at the moment.
    """
    for pattern in (".incomplete-*", ".removed-*"):
        for leftover in checkpoints.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def quarantine(folder: Path) -> Path:
    """Rename a damaged checkpoint so that it is not found as one; return its new folder."""
    damaged = folder.with_name(f"damaged-{folder.name}")
    shutil.rmtree(damaged, ignore_errors=True)
    os.replace(folder, damaged)
    sync_path(folder.parent)
    return damaged


def checkpoint_digest(folder: Path, patterns: Iterable[str] = ("*",)) -> str:
    """Return the SHA-256, hex, over the names and contents of a checkpoint's files.

    Reads all files of the patterns.
    """
    total = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        total.update(f"{path.name} {file_digest(path)}\n".encode())
    return total.hexdigest()


def prune(checkpoints: Path, keep_last: int, verified: Collection[int]) -> list[int]:
    """Remove complete checkpoints, each under a hidden name first, and return their steps.

    The newest `keep_last` stay, and so does the newest verified one: without any, all stay.

    Args:
        checkpoints: folder of all checkpoints.
        keep_last: how many of the newest to keep.
        verified: steps whose digests are correct.
    """
    steps = complete_steps(checkpoints)
    verified_steps = [step for step in steps if step in verified]
    if not verified_steps:
        return []
    removed = [step for step in steps[:-keep_last] if step != verified_steps[-1]]
    for step in removed:
        _hide(step_folder(checkpoints, step))
    sync_path(checkpoints)
    for step in removed:
        shutil.rmtree(_hidden(step_folder(checkpoints, step)), ignore_errors=True)
    return removed
