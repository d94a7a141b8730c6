"""Checkpoints as folders: `<run>/checkpoints/step-00000020`, complete or absent, never half.

A checkpoint is written under a hidden name, made durable, and renamed: the rename is the commit. `state.json` beside
megatron-core's files says what the weights are; it is plain JSON, read before anything else is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_kd.config import ConfigError, ModelSection
from megatron_kd.config.durable import sync_path

FORMAT = 1
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
_SHAPE += ("tied_embeddings", "qk_norm", "qkv_bias", "norm_eps", "rope_base", "rope_scaling_factor", "rope_low_frequency_factor")
_SHAPE += ("rope_high_frequency_factor", "rope_original_length", "sliding_window")


@dataclass(frozen=True)
class CheckpointInfo:
    """The content of state.json.

    model: the model section. vocab_size: true number of ids. tokenizer: digest of the vocabulary, or None. Counters are as of
    `step` finished updates. distributed_optimizer: which form the optimizer state has, None for weights alone.
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
    raise ConfigError(f"{what}: no checkpoint at {path} (expected a run directory, its checkpoints folder, or a step-* folder)")


def read_info(folder: Path, *, what: str) -> CheckpointInfo:
    """state.json of a checkpoint; ConfigError where it cannot be understood."""
    try:
        content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        version = content.pop("format")
        if version != FORMAT:
            raise ConfigError(f"{what}: {folder} has checkpoint format {version}, this version reads format {FORMAT}")
        return CheckpointInfo(**content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{what}: {folder / 'state.json'} cannot be read ({error})") from error


def check_same_model(info: CheckpointInfo, model: ModelSection, *, vocab_size: int, tokenizer: str | None, folder: Path, what: str) -> None:
    """ConfigError unless the checkpoint holds this model: same shape, vocabulary and tokenizer."""
    saved, wanted = info.model_section(), model
    for name in _SHAPE:
        here, there = _effective(wanted, name), _effective(saved, name)
        if here != there:
            raise ConfigError(f"{what}: {folder} holds another model: model.{name} is {there} there and {here} here")
    check_same_vocabulary(info, vocab_size=vocab_size, tokenizer=tokenizer, folder=folder, what=what)


def check_same_vocabulary(info: CheckpointInfo, *, vocab_size: int, tokenizer: str | None, folder: Path, what: str) -> None:
    """ConfigError unless the checkpoint's ids mean the same as this run's."""
    if info.vocab_size != vocab_size:
        raise ConfigError(f"{what}: {folder} has a vocabulary of {info.vocab_size} ids, this run has {vocab_size}: use the same tokenizer")
    if info.tokenizer is not None and tokenizer is not None and info.tokenizer != tokenizer:
        raise ConfigError(f"{what}: {folder} was made with another tokenizer (digest {info.tokenizer}, this run's is {tokenizer})")


def _effective(model: ModelSection, name: str) -> Any:
    if name == "num_query_groups":
        return model.num_query_groups or model.num_attention_heads
    if name == "head_dim":
        return model.head_dim or model.hidden_size // model.num_attention_heads
    return getattr(model, name)


class PendingCheckpoint:
    """A checkpoint being written: a hidden folder until `commit`. For one rank only."""

    def __init__(self, checkpoints: Path, step: int) -> None:
        self.final = step_folder(checkpoints, step)
        self.folder = checkpoints / f".incomplete-{self.final.name}"

    def start(self) -> None:
        """An empty folder; what an interrupted save left is removed."""
        for leftover in self.folder.parent.glob(".incomplete-*") if self.folder.parent.is_dir() else []:
            shutil.rmtree(leftover)
        self.folder.mkdir(parents=True)

    def commit(self, info: CheckpointInfo) -> None:
        """Write state.json, make every file durable, and give the folder its name."""
        content: Mapping[str, Any] = {"format": FORMAT, **asdict(info)}
        (self.folder / "state.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for path in [*self.folder.iterdir(), self.folder]:
            sync_path(path)
        if self.final.exists():
            shutil.rmtree(self.final)
        os.replace(self.folder, self.final)
        sync_path(self.final.parent)


def checkpoint_digest(folder: Path, patterns: Iterable[str] = ("*",)) -> str:
    """SHA-256, hex, over the names and contents of a checkpoint's files (those of a pattern). Reads all of them."""
    total = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        with open(path, "rb") as stream:
            total.update(f"{path.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def prune(checkpoints: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` complete checkpoints; each vanishes under a hidden name first."""
    for step in complete_steps(checkpoints)[:-keep_last]:
        folder = step_folder(checkpoints, step)
        doomed = checkpoints / f".incomplete-removed-{folder.name}"
        os.replace(folder, doomed)
        shutil.rmtree(doomed)
