"""Build the data sets of a run file, and cut this rank's microbatches out of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_kd.config import RunConfig
from megatron_kd.data.batches import BatchLayout, BatchSource
from megatron_kd.data.dataset import DatasetRequest, TokenDataset, build_dataset
from megatron_kd.parallel.groups import Groups
from megatron_kd.train.startup.input_checks import Inputs


@dataclass(frozen=True)
class TokenFiles:
    """Name the token files of one data set.

    Attributes:
        name: key of the run file, for messages.
        prefixes: paths without extension.
        weights: shares of the prefixes in the samples; None: by their sizes.
    """

    name: str
    prefixes: Sequence[str]
    weights: Sequence[float] | None = None


def token_dataset(
    config: RunConfig,
    inputs: Inputs,
    files: TokenFiles,
    num_samples: int,
    *,
    repeat: bool = True,
) -> TokenDataset:
    """Return the samples of a data set in the run's order; see `build_dataset`.

    Args:
        config: the run.
        inputs: its checked inputs.
        files: of the data set.
        num_samples: samples that the complete run reads.
        repeat: pass over the data as often as needed; else at most once.

    Collectives:
        Over the world.
    """
    request = DatasetRequest(
        prefixes=files.prefixes,
        weights=files.weights,
        num_samples=num_samples,
        sequence_length=config.batch.sequence_length,
        seed=config.train.seed,
        index_cache=config.data.index_cache or config.run.directory / "index_cache",
        end_of_document=inputs.tokenizer.end_of_document if inputs.tokenizer else None,
        vocab_size=inputs.vocab_size,
        mask_end_of_document=config.data.mask_end_of_document,
        within_documents=config.data.document_attention == "within",
        name=files.name,
        repeat=repeat,
    )
    return build_dataset(request)


def build_train_data(config: RunConfig, inputs: Inputs, groups: Groups) -> BatchSource:
    """Return the microbatches of the training data. Collective over the world."""
    files = TokenFiles("data.train", config.data.train, config.data.train_weights)
    samples = config.train.steps * config.batch.global_batch_size
    dataset = token_dataset(config, inputs, files, samples)
    return _batch_source(config, inputs, groups, dataset, pad_last=False)


def build_valid_data(config: RunConfig, inputs: Inputs, groups: Groups) -> dict[str, BatchSource]:
    """Return the microbatches of each validation set. Collective over the world."""
    samples = config.train.evaluate_batches * config.batch.global_batch_size
    sources = {}
    for name, prefix in config.data.valid.items():
        files = TokenFiles(f"data.valid.{name}", [prefix])
        dataset = token_dataset(config, inputs, files, samples, repeat=False)
        sources[name] = _batch_source(config, inputs, groups, dataset, pad_last=True)
    return sources


def _batch_source(
    config: RunConfig, inputs: Inputs, groups: Groups, dataset: TokenDataset, *, pad_last: bool
) -> BatchSource:
    layout = BatchLayout(
        global_batch_size=config.batch.global_batch_size,
        micro_batch_size=config.batch.micro_batch_size,
        data_parallel_rank=groups.data_rank,
        data_parallel_size=groups.data_size,
    )
    return BatchSource(
        dataset,
        layout,
        vocab_size=inputs.vocab_size,
        device=groups.platform.device,
        pad_last=pad_last,
    )
