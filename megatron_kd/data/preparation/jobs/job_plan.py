"""Plan a job: find its input, cut it into pieces, and keep input and output apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kd.config import ConfigError
from megatron_kd.data.preparation.documents import find_text_files, make_pieces
from megatron_kd.data.preparation.formats.document_format import TextFile, Unit
from megatron_kd.data.preparation.jobs.job import Job
from megatron_kd.data.tokenizer import TokenizerInfo, encoding_digest
from megatron_kd.data.vocabularies.vocabulary import Vocabulary

_MAX_DESCRIPTION_BYTES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """State the input and output of a job; the base class of both kinds of request.

    Attributes:
        inputs: files, folders or globs.
        output: prefix of the first split.
        tokenizer: path of the tokenizer.
        patterns: names of the files to take from folders.
        exclude: names of files and subfolders to leave out.
        holdout: (name, fraction) of further splits, which lie beside the output.
        end_of_document: see `load_tokenizer`.
        pattern: see `load_tokenizer`.
        strict: stop at the first document that cannot be used.
        piece_bytes: size of a piece of work; None for a size that suits the input.
    """

    inputs: Sequence[str]
    output: Path
    tokenizer: str
    patterns: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    holdout: Sequence[tuple[str, float]] = ()
    end_of_document: str | None = None
    pattern: str | None = None
    strict: bool = False
    piece_bytes: int | None = None

    @property
    def splits(self) -> tuple[tuple[str, float], ...]:
        """Name and fraction of each split; the first takes the remainder."""
        return ((self.output.name, 0.0), *self.holdout)

    def job_settings(self, vocabulary: Vocabulary) -> dict[str, Any]:
        """Return the fields of a job that every kind of job has."""
        return {
            "tokenizer": str(Path(self.tokenizer).absolute()),
            "encoding": encoding_digest(self.tokenizer, vocabulary),
            "splits": self.splits,
            "end_of_document": self.end_of_document,
            "pattern": self.pattern,
            "strict": self.strict,
        }


@dataclass(frozen=True)
class JobPlan:
    """Hold a job and its pieces of work.

    Attributes:
        output: prefix of the first split; the others lie beside it under their own names.
        job: what is written.
        info: identity of the tokenizer.
        dtype: integer type of the ids.
        pieces: units of each piece.
        made_from: digest of the job over all pieces.
    """

    output: Path
    job: Job
    info: TokenizerInfo
    dtype: np.dtype
    pieces: list[list[Unit]]
    made_from: str

    @property
    def folder(self) -> Path:
        """Folder of the finished pieces."""
        return self.output.with_name(f"{self.output.name}.pieces")

    @property
    def prefixes(self) -> list[Path]:
        """Prefix of each split."""
        return [self.output.with_name(name) for name, _ in self.job.splits]

    @property
    def size(self) -> int:
        """Bytes of all input."""
        return sum(unit.size for piece in self.pieces for unit in piece)


def make_plan(
    request: PlanRequest, job: Job, info: TokenizerInfo, dtype: np.dtype, format_choice: str
) -> JobPlan:
    """Cut the input of a job into pieces. Nothing is written.

    Args:
        request: input and output.
        job: what is written.
        info: identity of the tokenizer.
        dtype: integer type of the ids.
        format_choice: name of the input format, or "auto".

    Returns:
        The plan.

    Raises:
        ConfigError: there is no input, or a file that no tool here wrote has an output's name.
    """
    names = [name for name, _ in request.splits]
    files = find_text_files(request.inputs, request.patterns, request.exclude)
    files = _without_output(files, request.output, names)
    pieces = make_pieces(files, format_choice, request.piece_bytes)
    for path in (request.output.with_name(f"{name}.json") for name in names):
        if path.exists() and not _is_description(path):
            raise ConfigError(
                f"{path} is there already and does not describe token files: "
                "choose another --output, or move it away"
            )
    return JobPlan(request.output, job, info, dtype, pieces, job.digest(pieces))


def _is_description(path: Path) -> bool:
    try:
        if path.stat().st_size >= _MAX_DESCRIPTION_BYTES:
            return False
        return "tokenizer_digest" in json.loads(path.read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def _without_output(
    files: Sequence[TextFile], output: Path, names: Sequence[str]
) -> list[TextFile]:
    """Leave out the files that this job writes.

    They lie in the folder of the input when a job is run a second time.
    """
    folder = output.parent.resolve()
    written = {f"{name}.{ending}" for name in names for ending in ("bin", "idx", "roles")}
    written |= {f"{output.name}.pieces", f"{output.name}.logs"}
    descriptions = {folder / f"{name}.json" for name in names}

    def is_output(path: Path) -> bool:
        path = path.parent.resolve() / path.name
        if not path.is_relative_to(folder):
            return False
        if path.relative_to(folder).parts[0] in written:
            return True
        return path in descriptions and _is_description(path)

    inputs = [file for file in files if not is_output(file.path)]
    if not inputs:
        raise ConfigError(
            f"the only input is what lies under the name of the output, {output}: "
            "change --input or --output"
        )
    return inputs
