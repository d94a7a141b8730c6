"""Make tiny token files and datasets over them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from megatron_kd.data.batches import BatchLayout, BatchSource
from megatron_kd.data.dataset import DatasetRequest, TokenDataset, build_dataset
from megatron_kd.data.preparation.token_file_writer import TokenFileWriter

EOD = 2
VOCAB = 900


def write_tokens(
    prefix: Path, documents: list[list[int]], dtype: str = "<u2", **description: object
) -> str:
    with TokenFileWriter(prefix, np.dtype(dtype)) as writer:
        for tokens in documents:
            writer.add(np.array(tokens), np.array([len(tokens)]))
        writer.commit(**{"tokenizer_digest": "abc", **description})
    return str(prefix)


def random_documents(count: int, seed: int = 0) -> list[list[int]]:
    """Make documents of up to 60 random ids that end with EOD."""
    generator = np.random.default_rng(seed)
    return [
        [*generator.integers(3, VOCAB, generator.integers(1, 60)).tolist(), EOD]
        for _ in range(count)
    ]


def overwrite(path: str, offset: int, data: bytes) -> None:
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def build(
    prefixes: list[str] | str, cache: Path, weights: list[float] | None = None, **changes: object
) -> TokenDataset:
    """Build a dataset of 96 samples of 16 tokens, changed by keyword arguments."""
    settings: dict[str, object] = dict(
        num_samples=96,
        sequence_length=16,
        seed=5,
        index_cache=cache,
        end_of_document=EOD,
        vocab_size=VOCAB,
        name="data.train",
    )
    request = DatasetRequest(
        prefixes=[prefixes] if isinstance(prefixes, str) else prefixes,
        weights=weights,
        **(settings | changes),  # type: ignore[arg-type]
    )
    return build_dataset(request)


def all_tokens(dataset: TokenDataset) -> torch.Tensor:
    return torch.stack([dataset[sample]["tokens"] for sample in range(len(dataset))])


def batch_source(
    dataset: TokenDataset, rank: int = 0, size: int = 1, **changes: object
) -> BatchSource:
    """Make a source of global batches of 12 samples, changed by keyword arguments."""
    sizes: dict[str, object] = {"global_batch_size": 12, "micro_batch_size": 2}
    sizes |= {name: changes.pop(name) for name in sizes if name in changes}
    layout = BatchLayout(data_parallel_rank=rank, data_parallel_size=size, **sizes)  # type: ignore[arg-type]
    settings: dict[str, object] = {"vocab_size": VOCAB, "device": "cpu"} | changes
    return BatchSource(dataset, layout, **settings)  # type: ignore[arg-type]
