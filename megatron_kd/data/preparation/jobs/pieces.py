"""Make the pieces of a job in parallel, so that finished ones survive any interruption."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import asdict
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO

from megatron_kd.config import ConfigError
from megatron_kd.data.preparation.formats.document_format import Unit
from megatron_kd.data.preparation.jobs.job import (
    MAX_LISTED_PROBLEMS,
    Job,
    PieceSummary,
    piece_path,
)
from megatron_kd.data.preparation.jobs.job_plan import JobPlan
from megatron_kd.storage.atomic_files import write_atomically

# Called for each piece with its summary and whether an earlier run had made it.
Report = Callable[[PieceSummary, bool], None]


def read_summary(plan: JobPlan, number: int) -> PieceSummary | None:
    """Return the summary of a finished piece of this very job; None if it must be made."""
    job, folder = plan.job, plan.folder
    try:
        content = piece_path(folder, number, "json").read_text(encoding="utf-8")
        summary = PieceSummary(**json.loads(content))
        sizes = [
            [os.path.getsize(piece_path(folder, number, f"{split}.{kind}")) for kind in job.kinds]
            for split in range(len(job.splits))
        ]
    except (OSError, ValueError, TypeError):
        return None
    is_current = summary.made_from == job.digest([plan.pieces[number]])
    return summary if is_current and summary.sizes == sizes else None


def make_piece(number: int, piece: Sequence[Unit], job: Job, folder: Path) -> PieceSummary:
    """Encode one piece and leave its files and its summary in a folder.

    Args:
        number: number of the piece.
        piece: its units.
        job: what is written.
        folder: folder of the pieces, which must exist.

    Returns:
        The summary.

    Raises:
        ConfigError: the job is strict and a document has no text, or a document has more than
            2^31 - 1 ids.
        OSError: the files cannot be written; none of them remains.
    """
    count = len(job.splits)
    summary = PieceSummary(
        made_from=job.digest([piece]),
        documents=[0] * count,
        tokens=[0] * count,
        text_bytes=[0] * count,
        max_id=[-1] * count,
        sizes=[],
        size=sum(unit.size for unit in piece),
    )
    with ExitStack() as stack:
        files: list[list[IO[bytes]]] = []
        for split in range(count):
            files.append([])
            for kind in job.kinds:
                path = piece_path(folder, number, f"{split}.{kind}.partial-{os.getpid()}")
                stack.callback(path.unlink, missing_ok=True)
                files[-1].append(open(path, "wb"))  # noqa: SIM115  closed by the stack
                stack.callback(_close, files[-1][-1])
        job.write(piece, files, summary)
        for split, streams in enumerate(files):
            summary.sizes.append([stream.tell() for stream in streams])
            for stream, kind in zip(streams, job.kinds, strict=True):
                stream.flush()
                os.fsync(stream.fileno())
                os.replace(stream.name, piece_path(folder, number, f"{split}.{kind}"))
        write_atomically(piece_path(folder, number, "json"), json.dumps(asdict(summary)).encode())
    return summary


def _close(stream: IO[bytes]) -> None:
    # The data of a full disk cannot be written here either; the first error is being raised.
    with suppress(OSError):
        stream.close()


def run_pieces(plan: JobPlan, numbers: Sequence[int], workers: int, report: Report) -> None:
    """Make the pieces that do not exist yet.

    Args:
        plan: the job and its pieces.
        numbers: pieces to make.
        workers: processes.
        report: called for each piece, in order, with its summary and whether it was kept.

    Raises:
        ConfigError: see `make_piece`, or a worker died. Finished pieces remain.
        OSError: see `make_piece`. Finished pieces remain.
    """
    kept = {number: read_summary(plan, number) for number in numbers}
    missing = [number for number in numbers if kept[number] is None]
    if min(workers, len(missing)) <= 1:
        for number in numbers:
            summary = kept[number]
            if summary is not None:
                report(summary, True)
            else:
                report(make_piece(number, plan.pieces[number], plan.job, plan.folder), False)
        return
    with ProcessPoolExecutor(
        min(workers, len(missing)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_exit_with_parent,
    ) as pool:
        futures: dict[int, Future[PieceSummary]] = {
            number: pool.submit(make_piece, number, plan.pieces[number], plan.job, plan.folder)
            for number in missing
        }
        try:
            for number in numbers:
                summary = kept[number]
                report(summary or futures[number].result(), summary is not None)
        except BrokenProcessPool as error:
            raise ConfigError(
                "a worker died, most likely for lack of memory: "
                "use fewer --workers and run again to go on"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _exit_with_parent() -> None:
    """End this worker when its parent dies without notice; an orphan would wait forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_watch, args=(parent.sentinel,), daemon=True).start()


def _watch(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def list_problems(pieces: Sequence[Sequence[Unit]], summaries: Sequence[PieceSummary]) -> list[str]:
    """Return `file:line: reason` of the first documents that cannot be used.

    Lines count from the start of the file.
    """
    return list(islice(_problems(pieces, summaries), MAX_LISTED_PROBLEMS))


def _problems(pieces: Sequence[Sequence[Unit]], summaries: Sequence[PieceSummary]) -> Iterator[str]:
    lines_read: dict[Path, int] = {}
    for piece, summary in zip(pieces, summaries, strict=True):
        first_lines = []
        for unit, lines in zip(piece, summary.lines, strict=True):
            first_lines.append(lines_read.get(unit.file.path, 0))
            lines_read[unit.file.path] = first_lines[-1] + lines
        for file, unit_index, line, reason in summary.problems:
            position = f"{file}:{first_lines[unit_index] + line}" if line else f"{file}"
            yield f"{position}: {reason}"
