"""Checkpoints as folders: `<run>/checkpoints/step-00000020`, complete or absent, never half.

A checkpoint is written under a hidden name, its digests with it (`manifest.py`), made durable, and renamed: the rename is the commit.
`state.json` beside megatron-core's files says what the weights are; it is plain JSON, read before anything else is opened.
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
from megatron_kd.storage.atomic_files import sync_path

FORMAT = 2  # 1: without digests
_STEP = re.compile(r"step-(\d{8})")

# What decides whether weights fit: everything else in the model section may change between runs.
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
    """The content of state.json, which also says its format.

    model: the model section. vocab_size: true number of ids. tokenizer: digest of the vocabulary, or None. Counters are as of
    `step` finished updates. distributed_optimizer: which form the optimizer state has, None for weights alone.
    hidden_projections: [student layer, teacher layer, teacher's width] of each projection that trains along.
    settings: what else decides the run's weights, key by key; empty for weights alone.
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
        """The model section, checked."""
        return ModelSection.model_validate(self.model)


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of `step` is, once complete."""
    return checkpoints / f"step-{step:08d}"


def complete_steps(checkpoints: Path) -> list[int]:
    """Steps with a complete checkpoint in this folder, oldest first."""
    if not checkpoints.is_dir():
        return []
    names = (_STEP.fullmatch(entry.name) for entry in checkpoints.iterdir() if entry.is_dir())
    return sorted(int(match.group(1)) for match in names if match)


def find_checkpoint(path: Path, *, what: str) -> Path:
    """The newest complete checkpoint at `path`: a run directory, its checkpoints folder or one step folder.

    ConfigError naming `what` (a run-file key) where there is none.
    """
    if (path / "state.json").is_file():
        return path
    for folder in (path / "checkpoints", path):
        steps = complete_steps(folder)
        if steps:
            return step_folder(folder, steps[-1])
    raise ConfigError(
        f"{what}: no checkpoint at {path} (expected a run directory, its checkpoints folder, or a step-* folder)"
    )


def read_info(folder: Path, *, what: str) -> CheckpointInfo:
    """state.json of a checkpoint; ConfigError where it cannot be understood."""
    try:
        content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        version = content["format"]
        if version not in range(1, FORMAT + 1):
            raise ConfigError(
                f"{what}: {folder} has checkpoint format {version}, this version reads formats 1 to {FORMAT}"
            )
        return CheckpointInfo(**content)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{what}: {folder / 'state.json'} cannot be read ({error})") from error


def check_digests(folder: Path, info: CheckpointInfo, *, what: str) -> None:
    """ConfigError where a file of the checkpoint is not what was written. Reads all of them; no collective."""
    problems = verify(folder) if has_digests(folder, info) else []
    if problems:
        raise ConfigError(f"{what}: {damage_message(problems)}")


def has_digests(folder: Path, info: CheckpointInfo) -> bool:
    """Whether a checkpoint can be verified. What state.json says is not enough: that may be what is damaged."""
    return info.format > 1 or any((folder / name).exists() for name in (MANIFEST, COMMIT))


def damage_message(problems: Iterable[str]) -> str:
    """One sentence for the files that are wrong."""
    return f"{summarize_problems(problems)}: the checkpoint is damaged, use another copy or another step"


def check_same_model(
    info: CheckpointInfo,
    model: ModelSection,
    *,
    vocab_size: int,
    tokenizer: str | None,
    folder: Path,
    what: str,
) -> None:
    """ConfigError unless the checkpoint holds this model: same shape, vocabulary and tokenizer."""
    saved, wanted = info.model_section(), model
    for name in _SHAPE:
        here, there = _effective(wanted, name), _effective(saved, name)
        if here != there:
            raise ConfigError(
                f"{what}: {folder} holds another model: model.{name} is {there} there and {here} here"
            )
    check_same_vocabulary(
        info, vocab_size=vocab_size, tokenizer=tokenizer, folder=folder, what=what
    )


def check_same_vocabulary(
    info: CheckpointInfo, *, vocab_size: int, tokenizer: str | None, folder: Path, what: str
) -> None:
    """ConfigError unless the checkpoint's ids mean the same as this run's."""
    if info.vocab_size != vocab_size:
        raise ConfigError(
            f"{what}: {folder} has a vocabulary of {info.vocab_size} ids, this run has {vocab_size}: use the same tokenizer"
        )
    if info.tokenizer is not None and tokenizer is not None and info.tokenizer != tokenizer:
        raise ConfigError(
            f"{what}: {folder} was made with another tokenizer (digest {info.tokenizer}, this run's is {tokenizer})"
        )


def _effective(model: ModelSection, name: str) -> Any:
    if name == "num_query_groups":
        return model.num_query_groups or model.num_attention_heads
    if name == "head_dim":
        return model.head_dim or model.hidden_size // model.num_attention_heads
    return getattr(model, name)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or does not read back. Those before it are as they were."""


class PendingCheckpoint:
    """A checkpoint being written: a hidden folder until `commit`. For one rank only."""

    def __init__(self, checkpoints: Path, step: int) -> None:
        self.final = step_folder(checkpoints, step)
        self.folder = checkpoints / f".incomplete-{self.final.name}"

    def start(self) -> None:
        """An empty folder; what an interrupted save left is removed."""
        self.discard()
        self.folder.mkdir(parents=True)

    def discard(self) -> None:
        """Leave nothing behind, as far as the disk lets us."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def commit(
        self, info: CheckpointInfo, files: Mapping[str, FileRecord]
    ) -> dict[str, FileRecord]:
        """Write state.json, the manifest and its mark, and give the folder its name. `files`: all others, durable. Returns all."""
        data = (json.dumps(asdict(info), indent=2) + "\n").encode()
        written = {**files, "state.json": write_file(self.folder, "state.json", data)}
        seal(self.folder, written)
        replaced = self.final.exists()
        if replaced:
            _hide(self.final)
        os.replace(self.folder, self.final)
        sync_path(self.final.parent)
        if replaced:
            shutil.rmtree(_hidden(self.final), ignore_errors=True)
        return written


def _hidden(folder: Path) -> Path:
    return folder.with_name(f".removed-{folder.name}")


def _hide(folder: Path) -> None:
    """Take a checkpoint's name away, before it is removed file by file."""
    shutil.rmtree(_hidden(folder), ignore_errors=True)
    os.replace(folder, _hidden(folder))


def remove_leftovers(checkpoints: Path) -> None:
    """Remove what killed saves and removals have left. For a run that holds the directory and saves nothing at the moment."""
    for pattern in (".incomplete-*", ".removed-*"):
        for leftover in checkpoints.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def quarantine(folder: Path) -> Path:
    """Give a damaged checkpoint a name under which nothing looks for it; returns that."""
    aside = folder.with_name(f"damaged-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    sync_path(folder.parent)
    return aside


def checkpoint_digest(folder: Path, patterns: Iterable[str] = ("*",)) -> str:
    """SHA-256, hex, over the names and contents of a checkpoint's files (those of a pattern). Reads all of them."""
    total = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        with open(path, "rb") as stream:
            total.update(
                f"{path.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode()
            )
    return total.hexdigest()


def prune(checkpoints: Path, keep_last: int, good: Collection[int]) -> list[int]:
    """Remove complete checkpoints, each under a hidden name first; returns their steps.

    The newest `keep_last` stay, and the newest of those whose digests were found right (`good`): where nothing is verified, all stay.
    """
    steps = complete_steps(checkpoints)
    verified = [step for step in steps if step in good]
    if not verified:
        return []
    doomed = [step for step in steps[:-keep_last] if step != verified[-1]]
    for step in doomed:
        _hide(step_folder(checkpoints, step))
    sync_path(checkpoints)
    for step in doomed:
        shutil.rmtree(_hidden(step_folder(checkpoints, step)), ignore_errors=True)
    return doomed
