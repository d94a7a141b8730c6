"""How much likelier a teacher finds each document than a reference model does: difference sampling of MiniPLM (arXiv 2410.17215).

Score of a document: mean over its tokens but the first of log p_teacher - log p_reference, nats. A document longer than
`sequence_length` is cut into windows, each of which begins with the token before its first label and sees nothing before it; so every
token but the document's first is a label exactly once, and both models see the same. Documents never see each other.

Documents are scored in shards of consecutive ones. Each data-parallel replica takes every n-th shard and writes its sums when it is
done, so a job that is killed and started again repeats at most the shards it was at. File `shard-00000000.npy`: fp64 [3, documents],
sums of both models' log-probabilities and the number of labels.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
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
    """What scores depend on, written beside them. data: digest of the index and the ends of the ids. teacher, reference: digests."""

    data: str
    teacher: str
    reference: str
    sequence_length: int
    shard_tokens: int
    precision: str


def cut_shards(lengths: NDArray[np.int64], shard_tokens: int) -> list[tuple[int, int]]:
    """Half-open ranges of documents, each of about `shard_tokens` tokens."""
    ends = np.cumsum(lengths)
    marks = (
        np.searchsorted(ends, np.arange(shard_tokens, int(ends[-1]), shard_tokens), side="left") + 1
    )
    cuts = [0, *np.unique(marks).tolist(), len(lengths)]
    return [(start, stop) for start, stop in zip(cuts, cuts[1:], strict=False) if stop > start]


def agree_on_scores(folder: Path, scoring: Scoring) -> None:
    """Write what is being scored into `folder`. ConfigError, naming the difference, where scores of something else are there."""
    path = folder / ABOUT
    if path.exists():
        there, here = read_json(path, what="scores"), asdict(scoring)
        different = [
            f"{key} ({there.get(key)} there, {here[key]} here)"
            for key in here
            if there.get(key) != here[key]
        ]
        if different:
            raise ConfigError(
                f"{folder} has scores with another {', '.join(different)}: choose another --scores, or delete this folder"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(asdict(scoring), indent=2) + "\n").encode())


def shard_path(folder: Path, number: int) -> Path:
    """The file of one shard."""
    return folder / f"shard-{number:08d}.npy"


def read_scores(folder: Path, shards: list[tuple[int, int]]) -> NDArray[np.float64]:
    """Scores of all documents [D], NaN for those without a label. ConfigError for a shard that is damaged."""
    found = []
    for number, (start, stop) in enumerate(shards):
        path = shard_path(folder, number)
        try:
            sums = np.load(path, allow_pickle=False)
            if sums.shape != (3, stop - start) or not np.isfinite(sums).all():
                raise ValueError(f"{sums.shape} numbers where finite {(3, stop - start)} are due")
        except (OSError, ValueError, EOFError) as error:
            raise ConfigError(
                f"{path} is damaged ({error}): delete it and run the same command again"
            ) from error
        found.append(
            np.divide(
                sums[0] - sums[1], sums[2], out=np.full(stop - start, np.nan), where=sums[2] > 0
            )
        )
    return np.concatenate(found)


def score_shards(
    models: tuple[FrozenModel, FrozenModel],
    prefix: str | Path,
    index: TokenIndex,
    shards: list[tuple[int, int]],
    mine: list[int],
    folder: Path,
    *,
    sequence_length: int,
    batch_size: int,
    done: Callable[[int, int], None],
) -> None:
    """Score shards `mine` of this replica with (teacher, reference) and write each when it is complete.

    done: called with the number of finished shards and of tokens. Every rank of a replica calls this alike; no collective beyond it.
    """
    tokens, counted = np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r"), 0
    groups = models[0].groups
    for finished, number in enumerate(mine, 1):
        start, stop = shards[number]
        sums = torch.zeros(3, stop - start, dtype=torch.float64, device=groups.platform.device)
        for owners, inputs, labels in batches(
            tokens, index, start, stop, sequence_length, batch_size
        ):
            device = sums.device
            pairs = [
                log_probabilities(model, inputs.to(device), labels.to(device)) for model in models
            ]
            counted += int((labels >= 0).sum())
            values = [each for each in pairs if each is not None]
            if len(values) == 2:
                sums.index_add_(
                    1,
                    owners.to(device),
                    torch.stack([*values, (labels >= 0).sum(1).to(device, torch.float64)]),
                )
        if groups.reports_loss:
            buffer = io.BytesIO()
            np.save(buffer, sums.cpu().numpy(), allow_pickle=False)
            write_atomically(shard_path(folder, number), buffer.getvalue())
        done(finished, counted)


def batches(
    tokens: NDArray[np.integer],
    index: TokenIndex,
    start: int,
    stop: int,
    sequence_length: int,
    batch_size: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Windows of documents [start, stop): document - start int64 [B], inputs and labels int64 [B, S], S of the batch's longest window.

    Windows come by falling length, so that little is padded; padding has label -100.
    """
    windows = [
        (document, at, min(sequence_length, int(index.lengths[document]) - 1 - at))
        for document in range(start, stop)
        for at in range(0, int(index.lengths[document]) - 1, sequence_length)
    ]
    windows.sort(key=lambda window: (-window[2], window[0], window[1]))
    for first in range(0, len(windows), batch_size):
        part = windows[first : first + batch_size]
        inputs = torch.zeros(len(part), part[0][2], dtype=torch.int64)
        labels = torch.full_like(inputs, IGNORED_LABEL)
        for row, (document, at, length) in enumerate(part):
            begin = int(index.offsets[document]) // index.dtype.itemsize + at
            ids = torch.from_numpy(tokens[begin : begin + length + 1].astype(np.int64))
            inputs[row, :length], labels[row, :length] = ids[:-1], ids[1:]
        yield torch.tensor([document - start for document, _, _ in part]), inputs, labels


@torch.no_grad()
def log_probabilities(model: FrozenModel, inputs: Tensor, labels: Tensor) -> Tensor | None:
    """fp64 [B]: sum of the labels' log-probabilities in each row of [B, S]; None off the last stage. The same on all tensor ranks."""
    hidden = model.hidden(inputs)
    if hidden is None:
        return None
    found = linear_kd_cross_entropy(
        hidden,
        model.weight(),
        labels.T.contiguous(),
        None,
        alpha=0.0,
        vocab_size=model.vocab_size,
        tp_group=model.groups.tp,
    )
    return -found.ce.double().sum(0)
