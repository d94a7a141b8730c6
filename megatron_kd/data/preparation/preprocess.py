"""One preprocessing job from beginning to end: what is to be made, who makes which part, and putting the parts together.

On one machine a pool of processes makes the pieces. On a cluster datatrove's Slurm executor starts an array of tasks, each of which
makes its share, and a last one that puts them together. Both leave the same bytes.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kd.config import ConfigError
from megatron_kd.data.preparation.documents import (
    TextFile,
    Unit,
    find_text_files,
    make_pieces,
    unchanged,
)
from megatron_kd.data.preparation.pieces import (
    Job,
    PieceNote,
    find_note,
    first_problems,
    run_pieces,
)
from megatron_kd.data.token_files import read_index
from megatron_kd.data.tokenizer import TokenizerInfo, encoding_digest, load_tokenizer


@dataclass(frozen=True)
class Plan:
    """A job over its pieces. output: prefix of the first split; the others lie beside it under their own names."""

    output: Path
    job: Job
    info: TokenizerInfo
    dtype: np.dtype
    pieces: list[list[Unit]]
    made_from: str

    @property
    def folder(self) -> Path:
        """Where finished pieces wait."""
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
    inputs: Sequence[str],
    output: Path,
    tokenizer: str,
    *,
    patterns: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    format: str = "auto",
    holdout: Sequence[tuple[str, float]] = (),
    append_eod: bool = True,
    text_key: str = "text",
    end_of_document: str | None = None,
    pattern: str | None = None,
    strict: bool = False,
    piece_bytes: int | None = None,
) -> Plan:
    """Find the input, load the tokenizer, cut the work. Nothing is written.

    Raises:
        ConfigError: no input, no tokenizer, or one without an end of document where one is to be appended.
    """
    vocabulary, info = load_tokenizer(tokenizer, end_of_document=end_of_document, pattern=pattern)
    if append_eod and info.end_of_document is None:
        raise ConfigError(
            f"the tokenizer {tokenizer} names no token that ends documents: name one with --end-of-document, or give --no-append-eod"
        )
    splits = ((output.name, 0.0), *holdout)
    encoding = encoding_digest(tokenizer, vocabulary)
    job = Job(
        str(Path(tokenizer).absolute()),
        encoding,
        splits,
        append_eod,
        text_key,
        end_of_document,
        pattern,
        strict,
    )
    files = without_output(
        find_text_files(inputs, patterns, exclude), output, [name for name, _ in splits]
    )
    pieces = make_pieces(files, format, piece_bytes)
    refuse_foreign_files([output.with_name(name) for name, _ in splits])
    return Plan(output, job, info, vocabulary.dtype, pieces, job.digest(pieces))


def finished(plan: Plan) -> dict[str, Any] | None:
    """Descriptions of the output by prefix where it is complete and was made by this very plan, else None.

    What an earlier run had no time to remove is removed.
    """
    found = {}
    for prefix in plan.prefixes:
        try:
            sidecar = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
            tokens = read_index(prefix).num_tokens
            size = os.path.getsize(f"{prefix}.bin")
        except (OSError, ValueError):
            return None
        if not isinstance(sidecar, dict) or sidecar.get("made_from") != plan.made_from:
            return None
        if tokens != sidecar.get("tokens") or size != tokens * plan.dtype.itemsize:
            return None
        found[str(prefix)] = sidecar
    if plan.folder.is_dir():
        with holding(plan):
            shutil.rmtree(plan.folder)
    return found


def already_made(plan: Plan, *, overwrite: bool) -> dict[str, Any] | None:
    """The summary where there is nothing left to do. ConfigError where another job's output lies there, unless it may be replaced."""
    found = finished(plan)
    if found is not None:
        return {"outputs": found, "kept": True}
    if not overwrite:
        refuse_other_output(plan)
    return None


def make_whole(
    plan: Plan, workers: int, report: Callable[[PieceNote, bool], None]
) -> dict[str, Any]:
    """Every piece, then the output; its summary."""
    with holding(plan):
        make_share(plan, 0, 1, workers, report)
        return finish(plan)


def refuse_other_output(plan: Plan) -> None:
    """ConfigError where finished files of another job lie under the output's names."""
    for prefix in plan.prefixes:
        for ending in ("idx", "bin"):
            if not Path(f"{prefix}.{ending}").exists():
                continue
            same = False
            try:
                same = (
                    json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8")).get("made_from")
                    == plan.made_from
                )
            except (OSError, ValueError, AttributeError):
                pass
            if not same:
                raise ConfigError(
                    f"{prefix}.{ending} is there already, from other input, tokenizer or settings: choose another --output, or replace "
                    "it with --overwrite"
                )


def refuse_foreign_files(prefixes: Sequence[Path]) -> None:
    """ConfigError where a file that no tool here wrote has the name of a description, such as somebody's text."""
    for path in (Path(f"{prefix}.json") for prefix in prefixes):
        if path.exists() and not _is_description(path):
            raise ConfigError(
                f"{path} is there already and does not describe token files: choose another --output, or move it away"
            )


def _is_description(path: Path) -> bool:
    try:
        return path.stat().st_size < 1_000_000 and "tokenizer_digest" in json.loads(
            path.read_bytes()
        )
    except (OSError, ValueError, TypeError):
        return False


def without_output(files: Sequence[TextFile], output: Path, names: Sequence[str]) -> list[TextFile]:
    """The files less those that this very job writes, which lie in the input's folder when it is run a second time."""
    folder = output.parent.resolve()
    written = {f"{name}.{ending}" for name in names for ending in ("bin", "idx", "roles")} | {
        f"{output.name}.pieces",
        f"{output.name}.logs",
    }
    described = {folder / f"{name}.json" for name in names}

    def own(path: Path) -> bool:
        path = path.parent.resolve() / path.name
        if not path.is_relative_to(folder):
            return False
        return path.relative_to(folder).parts[0] in written or (
            path in described and _is_description(path)
        )

    left = [file for file in files if not own(file.path)]
    if not left:
        raise ConfigError(
            f"the only input is what lies under the name of the output, {output}: change --input or --output"
        )
    return left


@contextmanager
def holding(plan: Plan) -> Iterator[None]:
    """Keep every other process of this machine from making the same output; ConfigError where one does."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    with open(plan.folder / "lock", "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"another process is making {plan.output} just now: wait for it, or stop it"
            ) from error
        _sweep(plan)
        yield


def _sweep(plan: Plan) -> None:
    """Remove what killed processes left half-written."""
    for path in plan.folder.glob("*.partial-*"):
        path.unlink(missing_ok=True)
    for prefix in plan.prefixes:
        for path in prefix.parent.glob(f".{prefix.name}.*.partial-*"):
            path.unlink(missing_ok=True)


def make_share(
    plan: Plan, share: int, of: int, workers: int, report: Callable[[PieceNote, bool], None]
) -> None:
    """Make every `of`-th piece, beginning with piece `share`; see `run_pieces`."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    run_pieces(
        plan.pieces, plan.job, plan.folder, workers, range(share, len(plan.pieces), of), report
    )


def finish(plan: Plan) -> dict[str, Any]:
    """Put all pieces together and remove them; the summary of the job.

    Raises:
        ConfigError: a split without documents, input that changed while it was read, or a piece that is not there.
    """
    files = {unit.file for piece in plan.pieces for unit in piece}
    changed = sorted(str(file.path) for file in files if not unchanged(file))
    if changed:
        raise ConfigError(
            f"{changed[0]} changed while it was being read: run the same command again"
        )
    notes = []
    for number, piece in enumerate(plan.pieces):
        note = find_note(plan.folder, number, plan.job.digest([piece]), plan.job)
        if note is None:
            raise ConfigError(
                f"piece {number} of {len(plan.pieces)} is not there: run the same command without --shard to make it"
            )
        notes.append(note)
    num_problems, problems = (
        sum(note.num_problems for note in notes),
        first_problems(plan.pieces, notes),
    )
    too_long = sum(note.too_long for note in notes)
    for split, prefix in enumerate(plan.prefixes):
        if not sum(note.documents[split] for note in notes):
            if problems:
                reason = f"{num_problems} could not be used, the first: {problems[0]}"
                raise ConfigError(f"no document went into {prefix} ({reason}): {plan.job.advice}")
            raise ConfigError(
                f"no document went into {prefix}: give more text or another --holdout fraction"
            )
    about = {
        "tokenizer_digest": plan.info.digest, "vocab_size": plan.info.vocab_size, "end_of_document": plan.info.end_of_document,
        "made_from": plan.made_from, "dtype": plan.dtype.name,
    }  # fmt: skip
    outputs = {
        str(prefix): plan.job.publish(prefix, plan.dtype, plan.folder, split, notes, about)
        for split, prefix in enumerate(plan.prefixes)
    }
    shutil.rmtree(plan.folder)
    return {
        "outputs": outputs,
        "empty": sum(note.empty for note in notes),
        "unreadable": num_problems - too_long,
        **({"too_long": too_long} if "roles" in plan.job.kinds else {}),
        "unreadable_documents": problems,
        "pieces": len(plan.pieces),
    }


def share_step(plan: Plan, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
    """A datatrove pipeline step: this task's share of the pieces."""
    make_share(plan, rank, world_size, 1, lambda note, kept: None)


def finish_step(plan: Plan, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
    """A datatrove pipeline step: put the pieces together; the summary goes to the task's log."""
    started = time.monotonic()
    with holding(plan):
        summary = finish(plan)
    print(
        json.dumps(summary | {"seconds": round(time.monotonic() - started, 1)}, indent=2),
        flush=True,
    )


def submit(
    plan: Plan, *, tasks: int, partition: str, time_limit: str, logs: Path, options: dict[str, str]
) -> list[str]:
    """Hand the job to Slurm through datatrove: an array of tasks, and one that runs after them. The two job ids.

    Raises:
        ConfigError: datatrove is not installed, or sbatch is missing or refuses.
    """
    try:
        from datatrove.executor import SlurmPipelineExecutor
    except ImportError as error:
        raise ConfigError(
            "--executor slurm needs the package datatrove: pip install 'megatron-kd[preprocess]'"
        ) from error
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "--executor slurm needs Slurm's sbatch command on this machine: run it on a login node, or leave it out"
        )
    import sys

    common: dict[str, Any] = {
        "time": time_limit, "partition": partition, "sbatch_args": options, "qos": options.pop("qos", "normal"), "mail_user": None,
        "env_command": f"export PATH={Path(sys.executable).parent}:$PATH",
    }  # fmt: skip
    tasks = min(tasks, len(plan.pieces))
    plan.folder.mkdir(parents=True, exist_ok=True)
    first = SlurmPipelineExecutor(
        [partial(share_step, plan)], tasks=tasks, job_name="tokenize", logging_dir=str(logs / "share"),
        skip_completed=False, slurm_logs_folder=str(logs / "slurm"), **common,
    )  # fmt: skip
    last = SlurmPipelineExecutor(
        [partial(finish_step, plan)], tasks=1, job_name="tokenize_finish", logging_dir=str(logs / "finish"), depends=first,
        skip_completed=False, slurm_logs_folder=str(logs / "slurm"), **common,
    )  # fmt: skip
    try:
        last.run()
    except Exception as error:
        raise ConfigError(f"Slurm did not take the job ({error}): see its message above") from error
    return [str(first.job_id), str(last.job_id)]
