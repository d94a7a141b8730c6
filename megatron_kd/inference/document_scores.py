"""Score how much more probable a teacher finds each document than a reference model does.

This is the difference sampling of MiniPLM (arXiv 2410.17215). The score of a document is the mean
of log p_teacher - log p_reference over all its tokens but the first, in nats. A document longer
than `sequence_length` is split into windows. Each begins with the token before its first label and
sees nothing before it. So every token but the document's first is a label exactly once, and both
models see the same tokens. Documents never see each other.

Documents are scored in shards of consecutive ones. Each data-parallel replica takes every n-th
shard and writes its sums when it is done. So a job that is killed and started again repeats at most
the shards that were in progress. File `shard-00000000.npy`: fp64 [3, documents], the sums of both
models' log-probabilities and the number of labels.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_kd.config import ConfigError
from megatron_kd.data.token_files import TokenIndex
from megatron_kd.inference.frozen_model import FrozenModel
from megatron_kd.losses import linear_kd_cross_entropy
from megatron_kd.losses.spec import IGNORED_LABEL
from megatron_kd.storage.atomic_files import write_atomically
from megatron_kd.storage.json_files import read_json

ABOUT = "about.json"


@dataclass(frozen=True)
class Scoring:
    """Identify what was scored. It is stored beside the scores.

    Attributes:
        data: Digest of the token file, see data/token_digests.py.
        teacher: Digest of the teacher's checkpoint.
        reference: Digest of the reference model's checkpoint.
        sequence_length: Labels of a window.
        shard_tokens: Tokens of a shard.
        precision: Type of weights and activations.
    """

    data: str
    teacher: str
    reference: str
    sequence_length: int
    shard_tokens: int
    precision: str


@dataclass(frozen=True)
class ScoringJob:
    """Describe the documents to score and how they are batched.

    Attributes:
        prefix: Path of the token file without .bin/.idx.
        index: Its index.
        shards: Half-open ranges of documents of `cut_shards`.
        folder: Folder of the scores.
        sequence_length: Labels of a window.
        batch_size: Windows of one forward pass.
    """

    prefix: str | Path
    index: TokenIndex
    shards: list[tuple[int, int]]
    folder: Path
    sequence_length: int
    batch_size: int


def cut_shards(lengths: NDArray[np.int64], shard_tokens: int) -> list[tuple[int, int]]:
    """Return half-open ranges of documents of about `shard_tokens` tokens each.

    Args:
        lengths: Tokens of each document [D].
        shard_tokens: Tokens of a shard.
    """
    ends = np.cumsum(lengths)
    marks = (
        np.searchsorted(ends, np.arange(shard_tokens, int(ends[-1]), shard_tokens), side="left") + 1
    )
    cuts = [0, *np.unique(marks).tolist(), len(lengths)]
    return [(start, stop) for start, stop in zip(cuts, cuts[1:], strict=False) if stop > start]


def record_scoring(folder: Path, scoring: Scoring) -> None:
    """Write what is being scored into the folder of scores, or check what is there.

    Raises:
        ConfigError: The folder has scores of something else. The message names the differences.
    """
    path = folder / ABOUT
    if path.exists():
        stored, current = read_json(path, setting="scores"), asdict(scoring)
        differences = [
            f"{key} ({stored.get(key)} there, {current[key]} here)"
            for key in current
            if stored.get(key) != current[key]
        ]
        if differences:
            raise ConfigError(
                f"{folder} has scores with another {', '.join(differences)}: choose another "
                "--scores, or delete this folder"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(asdict(scoring), indent=2) + "\n").encode())


def shard_path(folder: Path, number: int) -> Path:
    """Return the path of a shard's scores."""
    return folder / f"shard-{number:08d}.npy"


def read_scores(folder: Path, shards: list[tuple[int, int]]) -> NDArray[np.float64]:
    """Return the scores of all documents [D], NaN for those without a label.

    Raises:
        ConfigError: A shard is damaged.
    """
    scores = []
    for number, (start, stop) in enumerate(shards):
        path = shard_path(folder, number)
        try:
            sums = np.load(path, allow_pickle=False)
            if sums.shape != (3, stop - start) or not np.isfinite(sums).all():
                raise ValueError(
                    f"{sums.shape} numbers where {(3, stop - start)} finite ones are expected"
                )
        except (OSError, ValueError, EOFError) as error:
            raise ConfigError(
                f"{path} is damaged ({error}): delete it and run the same command again"
            ) from error
        empty = np.full(stop - start, np.nan)
        scores.append(np.divide(sums[0] - sums[1], sums[2], out=empty, where=sums[2] > 0))
    return np.concatenate(scores)


def score_shards(
    models: tuple[FrozenModel, FrozenModel], job: ScoringJob, numbers: list[int]
) -> Iterator[tuple[int, int]]:
    """Score shards and write each when it is complete.

    Every rank of a replica iterates alike. The models' collectives are the only ones.

    Args:
        models: Teacher and reference.
        job: The documents.
        numbers: Shards of this replica.

    Yields:
        After each shard, the number of finished shards and of scored tokens.
    """
    tokens = np.memmap(f"{job.prefix}.bin", dtype=job.index.dtype, mode="r")
    num_labels = 0
    for finished, number in enumerate(numbers, 1):
        sums = _score_shard(models, job, tokens, number)
        # Ranks off the last stage have zeros, so labels are counted from the index.
        start, stop = job.shards[number]
        num_labels += int(np.maximum(job.index.lengths[start:stop].astype(np.int64) - 1, 0).sum())
        if models[0].groups.reports_loss:
            buffer = io.BytesIO()
            np.save(buffer, sums.cpu().numpy(), allow_pickle=False)
            write_atomically(shard_path(job.folder, number), buffer.getvalue())
        yield finished, num_labels


def _score_shard(
    models: tuple[FrozenModel, FrozenModel],
    job: ScoringJob,
    tokens: NDArray[np.integer],
    number: int,
) -> Tensor:
    """Return the sums of one shard, fp64 [3, documents], complete on the last stage."""
    start, stop = job.shards[number]
    device = models[0].groups.platform.device
    sums = torch.zeros(3, stop - start, dtype=torch.float64, device=device)
    for documents, inputs, labels in _batches(job, tokens, start, stop):
        pairs = [log_probabilities(model, inputs.to(device), labels.to(device)) for model in models]
        values = [value for value in pairs if value is not None]
        if len(values) == 2:
            counts = (labels >= 0).sum(1).to(device, torch.float64)
            sums.index_add_(1, documents.to(device), torch.stack([*values, counts]))
    return sums


def _batches(
    job: ScoringJob, tokens: NDArray[np.integer], start: int, stop: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the windows of documents [start, stop) in batches.

    Windows are sorted by falling length, so that there is little padding. It has label -100.

    Yields:
        Documents minus `start`, int64 [B]; inputs and labels, int64 [B, S], S of the longest
        window.
    """
    index, length = job.index, job.sequence_length
    windows = [
        (document, offset, min(length, int(index.lengths[document]) - 1 - offset))
        for document in range(start, stop)
        for offset in range(0, int(index.lengths[document]) - 1, length)
    ]
    windows.sort(key=lambda window: (-window[2], window[0], window[1]))
    for begin in range(0, len(windows), job.batch_size):
        batch = windows[begin : begin + job.batch_size]
        inputs = torch.zeros(len(batch), batch[0][2], dtype=torch.int64)
        labels = torch.full_like(inputs, IGNORED_LABEL)
        for position, (document, offset, num_labels) in enumerate(batch):
            token = int(index.offsets[document]) // index.dtype.itemsize + offset
            ids = torch.from_numpy(tokens[token : token + num_labels + 1].astype(np.int64))
            inputs[position, :num_labels], labels[position, :num_labels] = ids[:-1], ids[1:]
        yield torch.tensor([document - start for document, _, _ in batch]), inputs, labels


@torch.no_grad()
def log_probabilities(model: FrozenModel, inputs: Tensor, labels: Tensor) -> Tensor | None:
    """Return the sum of the labels' log-probabilities in each window.

    Args:
        model: The model.
        inputs: Ids, int64 [B, S].
        labels: Ids, int64 [B, S]; -100 is ignored.

    Returns:
        fp64 [B], nats, the same on all tensor-parallel ranks; None except on the last stage.
    """
    hidden = model.hidden(inputs)
    if hidden is None:
        return None
    loss = linear_kd_cross_entropy(
        hidden,
        model.weight(),
        labels.T.contiguous(),
        None,
        alpha=0.0,
        vocab_size=model.vocab_size,
        tp_group=model.groups.tp,
    )
    return -loss.ce.double().sum(0)
