"""Test that microbatches depend only on the number of consumed samples and the layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_kd.config import ConfigError
from megatron_kd.data.batches import Microbatch
from megatron_kd.data.dataset import TokenDataset
from tests.data.token_data import batch_source, build, random_documents, write_tokens


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "train", random_documents(60))


@pytest.fixture
def train(prefix: str, tmp_path: Path) -> TokenDataset:
    return build(prefix, tmp_path / "cache")


def equal(first: list[Microbatch], second: list[Microbatch]) -> bool:
    names = ("tokens", "labels", "loss_mask", "position_ids", "sample_ids")
    return len(first) == len(second) and all(
        torch.equal(getattr(one, name), getattr(two, name))
        for one, two in zip(first, second, strict=True)
        for name in names
    )


def test_microbatches_follow_the_documented_layout(train: TokenDataset) -> None:
    for rank in range(2):
        for number, batch in enumerate(
            batch_source(train, rank, 2, micro_batch_size=3).microbatches(24)
        ):
            assert batch.sample_ids.tolist() == [24 + (number * 2 + rank) * 3 + i for i in range(3)]
            assert (
                batch.tokens.shape
                == batch.labels.shape
                == batch.loss_mask.shape
                == batch.position_ids.shape
                == (3, 16)
            )
            assert torch.equal(batch.labels[:, :-1], batch.tokens[:, 1:])
            assert batch.labels.dtype == batch.sample_ids.dtype == torch.int64
            assert torch.equal(
                batch.tokens,
                torch.stack([train[int(sample)]["tokens"] for sample in batch.sample_ids]),
            )


@pytest.mark.parametrize("consumed", [0, 12, 84])
def test_a_global_batch_is_the_same_for_every_layout(consumed: int, train: TokenDataset) -> None:
    expected = {sample: train[sample] for sample in range(consumed, consumed + 12)}
    for size in (1, 2, 3, 6):
        for micro in (1, 2):
            batches = [
                batch
                for rank in range(size)
                for batch in batch_source(train, rank, size, micro_batch_size=micro).microbatches(
                    consumed
                )
            ]
            ids = torch.cat([batch.sample_ids for batch in batches]).tolist()
            assert sorted(ids) == list(range(consumed, consumed + 12))
            tokens, labels = (
                torch.cat([batch.tokens for batch in batches]),
                torch.cat([batch.labels for batch in batches]),
            )
            for position, sample in enumerate(ids):
                assert torch.equal(tokens[position], expected[sample]["tokens"])
                assert torch.equal(labels[position], expected[sample]["labels"])


@pytest.mark.fault("S8")
def test_resuming_anywhere_gives_the_same_microbatches(train: TokenDataset) -> None:
    running = batch_source(train, 1, 2)
    steps = {consumed: running.microbatches(consumed) for consumed in range(0, 96, 12)}
    for consumed in (0, 60, 24, 24, 36, 12, 84):
        assert equal(steps[consumed], batch_source(train, 1, 2).microbatches(consumed)), (
            "a fresh source"
        )
        assert equal(steps[consumed], running.microbatches(consumed)), "the same source, moved"
    assert torch.equal(running.microbatches(5)[0].sample_ids, torch.tensor([7, 8])), (
        "any position, not only whole steps"
    )


def test_the_end_of_the_data_is_an_error_or_filled(train: TokenDataset) -> None:
    with pytest.raises(
        ConfigError, match="data.train has 96 samples, but samples 90 to 101 were asked for"
    ):
        batch_source(train).microbatches(90)
    with pytest.raises(ConfigError):
        batch_source(train).microbatches(-12)
    assert batch_source(train, global_batch_size=10).num_batches == 9
    padded = batch_source(train, global_batch_size=10, pad_last=True)
    assert padded.num_batches == 10
    last = padded.microbatches(90)
    assert torch.cat([batch.sample_ids for batch in last]).tolist() == [*range(90, 96), *[-1] * 4]
    mask, labels = (
        torch.cat([batch.loss_mask for batch in last]),
        torch.cat([batch.labels for batch in last]),
    )
    assert mask[:6].min() == 1
    assert mask[6:].max() == 0
    assert (labels[6:] == -100).all()
    assert (labels[:6] >= 0).all()
    with pytest.raises(ConfigError):
        padded.microbatches(96)


def test_an_id_outside_the_vocabulary_names_its_sample(train: TokenDataset) -> None:
    bad = next(sample for sample in range(96) if train[sample]["labels"].max() > 880)
    with pytest.raises(
        ConfigError,
        match=rf"sample {bad} of data.train .document .* holds token id 8\d\d at position \d+",
    ):
        batch_source(train, vocab_size=881, global_batch_size=1, micro_batch_size=1).microbatches(
            bad
        )


class UnreadableSample:
    """A dataset with one sample that cannot be read."""

    name = "data.train"
    within_documents = False

    def __init__(self, dataset: TokenDataset, sample: int) -> None:
        self.dataset, self.sample = dataset, sample

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        if sample == self.sample:
            raise OSError(f"sample {sample} is gone")
        return self.dataset[sample]


def test_prefetching_raises_at_the_step_that_needs_the_sample(train: TokenDataset) -> None:
    failing = batch_source(UnreadableSample(train, 20))  # type: ignore[arg-type]
    failing.microbatches(0)
    with pytest.raises(OSError, match="sample 20 is gone"):
        failing.microbatches(12)
    assert len(failing.microbatches(24)) == 6


def test_batch_sizes_must_divide(train: TokenDataset) -> None:
    with pytest.raises(
        ConfigError, match="global_batch_size .12. must be a multiple of .* = 2 \\* 5 = 10"
    ):
        batch_source(train, 0, 5)
