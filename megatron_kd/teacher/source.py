"""Define what a teacher source is, and find the one that a run file names.

A source is everything about a teacher that a run needs before and besides its targets: the checks
of its inputs, its part of the fingerprints, the model that the planner counts, and the building of
the object that gives targets. The module `megatron_kd.teacher.<name>` holds the class `Source` of
the source that is declared as <name> in config/sections/teacher_section.py. Neither it nor this
module imports torch, so that bad input is reported without waiting for torch to import.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_kd.checkpoint.store import (
    CheckpointInfo,
    check_same_vocabulary,
    find_checkpoint,
    read_info,
)
from megatron_kd.config import ConfigError, ModelSection, RunConfig

if TYPE_CHECKING:
    from megatron_kd.parallel.groups import Groups
    from megatron_kd.teacher.teacher import Teacher

CHECKPOINT_KEY = "teacher.checkpoint"


@dataclass(frozen=True)
class TeacherInputs:
    """Hold the checked inputs of a teacher.

    Attributes:
        vocab_size: true number of ids, the student's too.
        tokenizer_digest: of the run's vocabulary; None without a tokenizer.
        folder: files of the teacher's model; None without a model.
        info: description of `folder` if it is a checkpoint of this program.
        model: shape of the teacher; None without a model, and for one of an unknown family.
    """

    vocab_size: int
    tokenizer_digest: str | None = None
    folder: Path | None = None
    info: CheckpointInfo | None = None
    model: ModelSection | None = None


class TeacherSource:
    """Base class of teacher sources; its defaults suit a source without files or model."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def read_model(self) -> ModelSection | None:
        """Return the shape of the teacher from its files, for the planner; None if unknown."""
        return None

    def check_inputs(
        self, vocab_size: int, tokenizer_digest: str | None, world_size: int
    ) -> TeacherInputs:
        """Check what can be checked without torch and without other ranks.

        Args:
            vocab_size: true number of ids of the run.
            tokenizer_digest: of the vocabulary of data.tokenizer; None without a tokenizer.
            world_size: ranks of the job.

        Raises:
            ConfigError: the teacher cannot serve this run; the same on every rank.
        """
        return TeacherInputs(vocab_size, tokenizer_digest)

    def run_fingerprint(self, inputs: TeacherInputs) -> dict[str, Any]:
        """Return setting -> JSON value of the teacher's content, for comparison on resume.

        Called on one rank. It may sample large files.

        Raises:
            ConfigError: the content cannot be read.
        """
        return {"teacher.source": self.config.teacher.source}

    def weights_fingerprint(self, inputs: TeacherInputs) -> dict[str, Any]:
        """Return setting -> JSON value of the teacher's content, which names a captured cache.

        Called on one rank. It reads files in full.
        """
        return {"teacher.source": self.config.teacher.source}

    def weights_digest(self, inputs: TeacherInputs) -> str | None:
        """Return the digest of the teacher's files, from rank 0; None without files.

        Collectives:
            One broadcast over the world.
        """
        return None

    def build(self, inputs: TeacherInputs, groups: Groups) -> Teacher:
        """Build the teacher of a training run. Collective over the world.

        Raises:
            ConfigError: on every rank, if the teacher cannot serve this run.
        """
        raise NotImplementedError

    def build_for_extraction(self, inputs: TeacherInputs, groups: Groups) -> Teacher:
        """Build the teacher in the student's layout, to store its targets. Collective.

        Raises:
            ConfigError: on every rank, if the source runs no teacher in the job.
        """
        raise ConfigError(
            f'teacher.source = "{self.config.teacher.source}" runs no teacher whose targets could '
            'be stored: set it to "online" or "huggingface"'
        )


def teacher_source(config: RunConfig) -> TeacherSource:
    """Return the source that teacher.source names."""
    module = importlib.import_module(f"megatron_kd.teacher.{config.teacher.source}")
    source: TeacherSource = module.Source(config)
    return source


def check_checkpoint(
    config: RunConfig, vocab_size: int, tokenizer_digest: str | None
) -> TeacherInputs:
    """Check teacher.checkpoint as a checkpoint of this program.

    Raises:
        ConfigError: there is none, it has another vocabulary, too short a window, or lacks a layer
            of distill.hidden_states.
    """
    assert config.teacher.checkpoint is not None
    folder = find_checkpoint(config.teacher.checkpoint, setting=CHECKPOINT_KEY)
    info = read_info(folder, setting=CHECKPOINT_KEY)
    model = info.model_section()
    check_same_vocabulary(
        info,
        vocab_size=vocab_size,
        tokenizer=tokenizer_digest,
        folder=folder,
        setting=CHECKPOINT_KEY,
    )
    window = model.window_problem(config.batch.sequence_length)
    if window is not None:
        raise ConfigError(f"{CHECKPOINT_KEY}: {folder}: batch.sequence_length {window}")
    for pair in config.distill.hidden_states:
        if pair.teacher_layer > model.num_layers:
            raise ConfigError(
                f"distill.hidden_states names teacher_layer {pair.teacher_layer}, but the teacher "
                f"{folder} has {model.num_layers} layers"
            )
    return TeacherInputs(vocab_size, tokenizer_digest, folder, info, model)


def check_layout(config: RunConfig, inputs: TeacherInputs, world_size: int) -> None:
    """Raise ConfigError if the run file's layout cannot hold the teacher's model."""
    if inputs.model is None:
        return
    problem = config.teacher_problem(inputs.model, world_size)
    if problem is not None:
        raise ConfigError(f"{CHECKPOINT_KEY}: {inputs.folder} has {problem}")


def read_checkpoint_model(path: Path | None) -> ModelSection | None:
    """Return the shape of the model in a checkpoint of this program; None without a path."""
    if path is None:
        return None
    folder = find_checkpoint(path, setting=CHECKPOINT_KEY)
    return read_info(folder, setting=CHECKPOINT_KEY).model_section()
