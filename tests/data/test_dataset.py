"""Test which samples a dataset holds and in which order."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_kd.config import ConfigError
from megatron_kd.data.dataset import TokenDataset
from megatron_kd.data.token_file_checks import check_token_file
from tests.data.token_data import (
    EOD,
    VOCAB,
    all_tokens,
    batch_source,
    build,
    overwrite,
    random_documents,
    write_tokens,
)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "train", random_documents(60))


@pytest.fixture
def train(prefix: str, tmp_path: Path) -> TokenDataset:
    return build(prefix, tmp_path / "cache")


def test_samples_are_consecutive_tokens_with_shifted_labels(tmp_path: Path) -> None:
    dataset = build(
        write_tokens(tmp_path / "train", [list(range(800))]), tmp_path / "cache", num_samples=49
    )
    starts = set()
    for sample in range(49):
        values = dataset[sample]
        assert torch.equal(values["labels"], values["tokens"] + 1), "labels must be the next tokens"
        assert torch.equal(values["position_ids"], torch.arange(16))
        assert torch.equal(values["loss_mask"], torch.ones(16))
        assert values["tokens"].dtype == values["labels"].dtype == torch.int64
        assert values["loss_mask"].dtype == torch.float32
        starts.add(int(values["tokens"][0]))
    assert starts == set(range(0, 784, 16)), "one pass must read everything once"
    assert dataset.num_tokens == 800
    assert dataset.epochs == pytest.approx(0.98)
    with pytest.raises(IndexError, match="sample 49 is outside the 49 samples of data.train"):
        dataset[49]


def test_the_order_is_a_function_of_data_seed_and_size(
    prefix: str, train: TokenDataset, tmp_path: Path
) -> None:
    first = all_tokens(train)
    assert torch.equal(first, all_tokens(build(prefix, tmp_path / "cache"))), "warm cache"
    for ending in (".bin", ".idx"):
        shutil.copy(prefix + ending, tmp_path / f"moved{ending}")
    assert torch.equal(first, all_tokens(build(str(tmp_path / "moved"), tmp_path / "other"))), (
        "another path and a cold cache"
    )
    assert not torch.equal(first, all_tokens(build(prefix, tmp_path / "cache", seed=6)))
    assert torch.equal(first[:40], all_tokens(build(prefix, tmp_path / "cache", num_samples=40))), (
        "the length of the run"
    )
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert all(path.suffix != ".npy" for path in Path(prefix).parent.iterdir())


def test_new_data_at_an_old_path_gets_a_new_order(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "train", random_documents(60))
    build(path, tmp_path / "cache", num_samples=18)
    write_tokens(tmp_path / "train", [list(range(300))])
    tokens = all_tokens(build(path, tmp_path / "cache", num_samples=18))
    assert torch.equal(tokens[:, 0] + 15, tokens[:, 15])
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_no_real_id_is_taken_for_padding(tmp_path: Path) -> None:
    documents = [[0, 1, EOD, VOCAB - 1] * 20]
    values = build(
        write_tokens(tmp_path / "train", documents, "<i4"), tmp_path / "cache", num_samples=1
    )[0]
    assert set(values["labels"].tolist()) == {0, 1, EOD, VOCAB - 1}
    assert values["loss_mask"].min() == 1
    overwrite(str(tmp_path / "train.bin"), 0, np.full(80, -1, "<i4").tobytes())
    dataset = build(str(tmp_path / "train"), tmp_path / "cache", num_samples=1)
    with pytest.raises(
        ConfigError,
        match=r"sample 0 of data.train .document 0 of .*train. "
        "holds token id -1 at position 0, outside",
    ):
        batch_source(dataset, global_batch_size=1, micro_batch_size=1).microbatches(0)


def test_end_of_document_can_be_masked(prefix: str, tmp_path: Path) -> None:
    dataset = build(prefix, tmp_path / "cache", mask_end_of_document=True)
    (batch,) = batch_source(dataset, global_batch_size=32, micro_batch_size=32).microbatches(0)
    ends = batch.tokens == EOD
    assert ends.any()
    assert torch.equal(batch.loss_mask == 0, ends)
    assert torch.equal(batch.labels == -100, ends)
    with pytest.raises(ConfigError, match="mask_end_of_document needs data.tokenizer"):
        build(prefix, tmp_path / "cache", mask_end_of_document=True, end_of_document=None)


def test_prefixes_are_blended_by_weight(prefix: str, tmp_path: Path) -> None:
    other = write_tokens(tmp_path / "other", [[1] * 400])
    size = check_token_file(prefix, vocab_size=VOCAB).num_tokens

    def share(weights: list[float] | None, num_samples: int = 200) -> float:
        dataset = build([prefix, other], tmp_path / "cache", weights, num_samples=num_samples)
        assert len(dataset) == num_samples
        return float((all_tokens(dataset)[:, 0] == 1).float().mean())

    assert share(None) == pytest.approx(400 / (size + 400), abs=0.01)
    assert share([1.0, 3.0]) == pytest.approx(0.75, abs=0.01)
    assert share([10.0, 30.0], 4000) == pytest.approx(0.75, abs=0.001), (
        "the smaller prefix must repeat"
    )


def test_validation_reads_each_token_once_at_most(prefix: str, tmp_path: Path) -> None:
    small = build(prefix, tmp_path / "cache", num_samples=20, repeat=False)
    full = build(prefix, tmp_path / "cache", num_samples=100_000, repeat=False)
    assert len(small) == 20
    assert len(full) == (full.num_tokens - 1) // 16
    assert full.epochs < 1
    assert torch.equal(all_tokens(small), all_tokens(full)[:20])


def test_a_sequence_longer_than_the_data_is_refused(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "train", [[5] * 9, [6] * 7])
    with pytest.raises(
        ConfigError,
        match=r"data.train: .*train has 16 tokens, "
        r"but one sample needs batch.sequence_length \+ 1 = 17",
    ):
        build(path, tmp_path / "cache")
    assert len(build(path, tmp_path / "cache", sequence_length=15, num_samples=3)) == 3


@pytest.fixture
def world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_process_group_changes_nothing(
    prefix: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    other = write_tokens(tmp_path / "other", [[1] * 400])
    expected = [
        all_tokens(build(paths, tmp_path / "single")) for paths in (prefix, [prefix, other])
    ]
    request.getfixturevalue("world_of_one")
    grouped = [
        all_tokens(build(paths, tmp_path / "grouped")) for paths in (prefix, [prefix, other])
    ]
    assert all(map(torch.equal, expected, grouped))


def test_importing_the_package_imports_neither_torch_nor_megatron() -> None:
    program = (
        "import sys, megatron_kd.data.token_file_checks, megatron_kd.data.tokenizer\n"
        "assert not {'torch', 'megatron'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        check=True,
        timeout=120,
    )
