"""Run a planned job from its pieces to its output.

On one machine a pool of processes makes the pieces. On a cluster each task of an array makes its
share and a last task joins them (`slurm`). Both leave the same bytes.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_kd.config import ConfigError
from megatron_kd.data.preparation.documents import unchanged
from megatron_kd.data.preparation.jobs.job import PieceSummary, SplitOutput
from megatron_kd.data.preparation.jobs.job_plan import JobPlan
from megatron_kd.data.preparation.jobs.pieces import (
    Report,
    list_problems,
    read_summary,
    run_pieces,
)
from megatron_kd.data.token_files import read_index


def existing_output(plan: JobPlan, *, overwrite: bool) -> dict[str, Any] | None:
    """Return the summary of a job that is already complete, else None.

    Args:
        plan: the job.
        overwrite: the output of another job may be replaced.

    Raises:
        ConfigError: another job's output has this output's names and may not be replaced.
    """
    descriptions = _complete_descriptions(plan)
    if descriptions is not None:
        return {"outputs": descriptions, "kept": True}
    if not overwrite:
        _refuse_other_output(plan)
    return None


def make_output(plan: JobPlan, workers: int, report: Report) -> dict[str, Any]:
    """Make every piece, then the output, and return its summary; see `run_pieces`."""
    with locked(plan):
        make_share(plan, (0, 1), workers, report)
        return join_pieces(plan)


def make_share(plan: JobPlan, share: tuple[int, int], workers: int, report: Report) -> None:
    """Make a share of the pieces.

    Args:
        plan: the job.
        share: (i, n) for every n-th piece from the i-th on.
        workers: processes.
        report: see `run_pieces`.
    """
    first, step = share
    plan.folder.mkdir(parents=True, exist_ok=True)
    run_pieces(plan, range(first, len(plan.pieces), step), workers, report)


def join_pieces(plan: JobPlan) -> dict[str, Any]:
    """Join all pieces into the output, remove them, and return the summary of the job.

    Raises:
        ConfigError: a split has no documents, input changed while it was read, or a piece is
            missing.
    """
    files = {unit.file for piece in plan.pieces for unit in piece}
    changed = sorted(str(file.path) for file in files if not unchanged(file))
    if changed:
        raise ConfigError(
            f"{changed[0]} changed while it was being read: run the same command again"
        )
    summaries = _read_summaries(plan)
    num_problems = sum(summary.num_problems for summary in summaries)
    too_long = sum(summary.too_long for summary in summaries)
    problems = list_problems(plan.pieces, summaries)
    for split, prefix in enumerate(plan.prefixes):
        if not sum(summary.documents[split] for summary in summaries):
            _refuse_empty_split(plan, prefix, num_problems, problems)
    outputs = {
        str(prefix): plan.job.publish(
            SplitOutput(prefix, plan.dtype, plan.folder, split, summaries, _description(plan))
        )
        for split, prefix in enumerate(plan.prefixes)
    }
    shutil.rmtree(plan.folder)
    return {
        "outputs": outputs,
        "empty": sum(summary.empty for summary in summaries),
        "unreadable": num_problems - too_long,
        **({"too_long": too_long} if "roles" in plan.job.kinds else {}),
        "unreadable_documents": problems,
        "pieces": len(plan.pieces),
    }


def _read_summaries(plan: JobPlan) -> list[PieceSummary]:
    summaries = []
    for number in range(len(plan.pieces)):
        summary = read_summary(plan, number)
        if summary is None:
            raise ConfigError(
                f"piece {number} of {len(plan.pieces)} is not there: "
                "run the same command without --shard to make it"
            )
        summaries.append(summary)
    return summaries


def _refuse_empty_split(
    plan: JobPlan, prefix: Path, num_problems: int, problems: list[str]
) -> None:
    if problems:
        raise ConfigError(
            f"no document went into {prefix} ({num_problems} could not be used, the first: "
            f"{problems[0]}): {plan.job.advice}"
        )
    raise ConfigError(
        f"no document went into {prefix}: give more text or another --holdout fraction"
    )


def _description(plan: JobPlan) -> dict[str, Any]:
    return {
        "tokenizer_digest": plan.info.digest,
        "vocab_size": plan.info.vocab_size,
        "end_of_document": plan.info.end_of_document,
        "made_from": plan.made_from,
        "dtype": plan.dtype.name,
    }


def _complete_descriptions(plan: JobPlan) -> dict[str, Any] | None:
    """Return the descriptions of the output by prefix if this very plan has completed it.

    Pieces that an earlier run had no time to remove are removed.
    """
    descriptions = {}
    for prefix in plan.prefixes:
        try:
            description = _read_description(prefix)
            num_tokens = read_index(prefix).num_tokens
            size = os.path.getsize(f"{prefix}.bin")
        except (OSError, ValueError):
            return None
        if description.get("made_from") != plan.made_from:
            return None
        if num_tokens != description.get("tokens") or size != num_tokens * plan.dtype.itemsize:
            return None
        descriptions[str(prefix)] = description
    if plan.folder.is_dir():
        with locked(plan):
            shutil.rmtree(plan.folder)
    return descriptions


def _read_description(prefix: Path) -> dict[str, Any]:
    description = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
    return description if isinstance(description, dict) else {}


def _refuse_other_output(plan: JobPlan) -> None:
    for prefix in plan.prefixes:
        for ending in ("idx", "bin"):
            if not Path(f"{prefix}.{ending}").exists():
                continue
            try:
                made_from = _read_description(prefix).get("made_from")
            except (OSError, ValueError):
                made_from = None
            if made_from != plan.made_from:
                raise ConfigError(
                    f"{prefix}.{ending} is there already, from other input, tokenizer or "
                    "settings: choose another --output, or replace it with --overwrite"
                )


@contextmanager
def locked(plan: JobPlan) -> Iterator[None]:
    """Keep every other process of this machine from making the same output.

    Raises:
        ConfigError: another process is making it.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    with open(plan.folder / "lock", "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"another process is making {plan.output} just now: wait for it, or stop it"
            ) from error
        _remove_partial_files(plan)
        yield


def _remove_partial_files(plan: JobPlan) -> None:
    """Remove what killed processes left incomplete."""
    for path in plan.folder.glob("*.partial-*"):
        path.unlink(missing_ok=True)
    for prefix in plan.prefixes:
        for path in prefix.parent.glob(f".{prefix.name}.*.partial-*"):
            path.unlink(missing_ok=True)
