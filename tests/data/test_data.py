"""Token files, sample order and microbatches, on tiny data made here."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_kd.config import ConfigError
from megatron_kd.data import dataset as dataset_module
from megatron_kd.data.batches import BatchSource, Microbatch
from megatron_kd.data.dataset import TokenDataset, build_dataset
from megatron_kd.data.indexed import TokenFileWriter, check_token_file

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


def some_documents(count: int, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [
        [*generator.integers(3, VOCAB, generator.integers(1, 60)).tolist(), EOD]
        for _ in range(count)
    ]


def build(
    prefixes: list[str] | str, cache: Path, weights: list[float] | None = None, **changes: object
) -> TokenDataset:
    settings: dict[str, object] = dict(
        num_samples=96,
        sequence_length=16,
        seed=5,
        index_cache=cache,
        end_of_document=EOD,
        vocab_size=VOCAB,
        name="data.train",
    )
    return build_dataset(
        [prefixes] if isinstance(prefixes, str) else prefixes, weights, **(settings | changes)
    )  # type: ignore[arg-type]


def all_tokens(dataset: TokenDataset) -> torch.Tensor:
    return torch.stack([dataset[sample]["tokens"] for sample in range(len(dataset))])


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "train", some_documents(60))


@pytest.fixture
def train(prefix: str, tmp_path: Path) -> TokenDataset:
    return build(prefix, tmp_path / "cache")


def test_token_files_are_megatrons_byte_for_byte(tmp_path: Path) -> None:
    with dataset_module._quiet_megatron():
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    documents = some_documents(20)
    for dtype in (np.uint16, np.int32):
        ours = write_tokens(tmp_path / f"ours{dtype.__name__}", documents, np.dtype(dtype).str)
        theirs = str(tmp_path / f"theirs{dtype.__name__}")
        builder = IndexedDatasetBuilder(f"{theirs}.bin", dtype=dtype)
        for tokens in documents:
            builder.add_document(np.array(tokens), [len(tokens)])
        builder.finalize(f"{theirs}.idx")
        for ending in (".bin", ".idx"):
            assert Path(ours + ending).read_bytes() == Path(theirs + ending).read_bytes()
        found = check_token_file(theirs, vocab_size=VOCAB)
        assert (found.num_tokens, found.num_documents, found.dtype) == (
            sum(map(len, documents)),
            20,
            np.dtype(dtype),
        )


def overwrite(path: str, at: int, data: bytes) -> None:
    with open(path, "r+b") as stream:
        stream.seek(at)
        stream.write(data)


DAMAGES = {
    "no bin": (lambda p: os.unlink(f"{p}.bin"), "cannot read .*bin .No such file"),
    "no idx": (lambda p: os.unlink(f"{p}.idx"), "cannot read .*idx .No such file"),
    "empty idx": (lambda p: os.truncate(f"{p}.idx", 0), "no Megatron index header .0 bytes"),
    "bad magic": (lambda p: overwrite(f"{p}.idx", 0, b"GARBAGE!!"), "no Megatron index header"),
    "bad version": (
        lambda p: overwrite(f"{p}.idx", 9, struct.pack("<Q", 7)),
        "version 7 and type code 8",
    ),
    "float type": (lambda p: overwrite(f"{p}.idx", 17, b"\x06"), "version 1 and type code 6"),
    "cut idx": (
        lambda p: os.truncate(f"{p}.idx", 90),
        "has 90 bytes, but its header .3 sequences, 4 marks. needs 102",
    ),
    "huge count": (
        lambda p: overwrite(f"{p}.idx", 18, struct.pack("<Q", 2**60)),
        "has 102 bytes, but its header",
    ),
    "lengths": (
        lambda p: overwrite(f"{p}.idx", 34, struct.pack("<i", 3)),
        "lengths and offsets disagree",
    ),
    "marks": (
        lambda p: overwrite(f"{p}.idx", 94, struct.pack("<q", 2)),
        "document marks do not cover its 3 sequences",
    ),
    "cut bin": (
        lambda p: os.truncate(f"{p}.bin", 11),
        "bin is truncated: it has 11 bytes and its index needs 18",
    ),
    "long bin": (
        lambda p: os.truncate(f"{p}.bin", 20),
        "bin is oversized: it has 20 bytes and its index needs 18",
    ),
    "sidecar": (lambda p: Path(f"{p}.json").write_text("[]"), "does not describe token data"),
    "old sidecar": (
        lambda p: Path(f"{p}.json").write_text(
            '{"tokenizer_digest": "abc", "tokens": 5, "max_id": 8}'
        ),
        "describes 5 tokens",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.fault(5)
def test_damaged_token_files_are_refused(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGES[name]
    path = write_tokens(tmp_path / "train", [[5, 6, 7, EOD], [8, EOD], [3, 4, EOD]])
    found = check_token_file(path, vocab_size=9, tokenizer_digest="abc")
    assert (found.num_tokens, found.num_documents, found.dtype) == (9, 3, np.dtype(np.uint16))
    damage(path)
    with pytest.raises(ConfigError, match=message) as caught:
        check_token_file(path, vocab_size=9, tokenizer_digest="abc")
    assert "\n" not in str(caught.value)


@pytest.mark.fault(9)
def test_another_tokenizer_is_refused_with_both_digests(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "train", [[5, EOD]], tokenizer_digest="a1b2")
    with pytest.raises(ConfigError, match="a1b2.*c3d4"):
        check_token_file(path, vocab_size=9, tokenizer_digest="c3d4")
    check_token_file(path, vocab_size=9)
    os.unlink(f"{path}.json")
    check_token_file(path, vocab_size=9, tokenizer_digest="c3d4")


@pytest.mark.parametrize(("dtype", "bad"), [("<u2", 950), ("<i4", 950), ("<i4", -7)])
@pytest.mark.fault(5)
def test_ids_outside_the_vocabulary_are_named(dtype: str, bad: int, tmp_path: Path) -> None:
    documents = some_documents(10)
    path = write_tokens(tmp_path / "train", documents, dtype)
    os.unlink(f"{path}.json")
    before = sum(map(len, documents[:4]))
    overwrite(
        f"{path}.bin", (before + 1) * np.dtype(dtype).itemsize, np.array(bad, dtype).tobytes()
    )
    with pytest.raises(
        ConfigError,
        match=f"token id {bad} .document 4, position 1., outside the vocabulary of {VOCAB} ids",
    ):
        check_token_file(path, vocab_size=VOCAB)


def test_large_files_are_sampled_from_first_token_to_last(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "train", [[5] * 10_000])
    check_token_file(path, vocab_size=9, scan_tokens=640)
    for position, found in ((0, True), (9_999, True), (5, True), (30, False)):
        Path(f"{path}.bin").write_bytes(np.full(10_000, 5, "<u2").tobytes())
        overwrite(f"{path}.bin", 2 * position, b"\xff\xff")
        if found:
            with pytest.raises(
                ConfigError, match=f"token id 65535 .document 0, position {position}."
            ):
                check_token_file(path, vocab_size=9, scan_tokens=640)
        else:
            check_token_file(path, vocab_size=9, scan_tokens=640)
    with pytest.raises(ConfigError, match="position 30"):
        check_token_file(path, vocab_size=9)
    path = write_tokens(tmp_path / "other", [[5] * 30 + [100] + [5] * 9_969])
    with pytest.raises(ConfigError, match="holds token id 100, but the vocabulary has 9 ids"):
        check_token_file(path, vocab_size=9, scan_tokens=640)


def test_the_writer_publishes_all_or_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError),
        TokenFileWriter(tmp_path / "train", np.dtype("<u2")) as writer,
    ):
        writer.add(np.array([1, 2]), np.array([2]))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with TokenFileWriter(tmp_path / "train", np.dtype("<u2")) as writer:
        with pytest.raises(ValueError, match="do not fit uint16"):
            writer.add(np.array([1, 70000]), np.array([2]))
        with pytest.raises(ValueError, match="lengths sum to 3"):
            writer.add(np.array([1, 2]), np.array([3]))
    assert list(tmp_path.iterdir()) == []


def test_samples_are_consecutive_tokens_with_shifted_labels(tmp_path: Path) -> None:
    dataset = build(
        write_tokens(tmp_path / "train", [list(range(800))]), tmp_path / "cache", num_samples=49
    )
    starts = set()
    for sample in range(49):
        row = dataset[sample]
        assert torch.equal(row["labels"], row["tokens"] + 1), "labels must be the next tokens"
        assert torch.equal(row["position_ids"], torch.arange(16))
        assert torch.equal(row["loss_mask"], torch.ones(16))
        assert row["tokens"].dtype == row["labels"].dtype == torch.int64
        assert row["loss_mask"].dtype == torch.float32
        starts.add(int(row["tokens"][0]))
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
    path = write_tokens(tmp_path / "train", some_documents(60))
    build(path, tmp_path / "cache", num_samples=18)
    write_tokens(tmp_path / "train", [list(range(300))])
    rows = all_tokens(build(path, tmp_path / "cache", num_samples=18))
    assert torch.equal(rows[:, 0] + 15, rows[:, 15])
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_no_real_id_is_taken_for_padding(tmp_path: Path) -> None:
    documents = [[0, 1, EOD, VOCAB - 1] * 20]
    row = build(
        write_tokens(tmp_path / "train", documents, "<i4"), tmp_path / "cache", num_samples=1
    )[0]
    assert set(row["labels"].tolist()) == {0, 1, EOD, VOCAB - 1}
    assert row["loss_mask"].min() == 1
    overwrite(str(tmp_path / "train.bin"), 0, np.full(80, -1, "<i4").tobytes())
    dataset = build(str(tmp_path / "train"), tmp_path / "cache", num_samples=1)
    with pytest.raises(
        ConfigError,
        match=r"sample 0 of data.train .document 0 of .*train. holds token id -1 at position 0, outside",
    ):
        source(dataset, global_batch_size=1, micro_batch_size=1).microbatches(0)


def test_end_of_document_can_be_masked(prefix: str, tmp_path: Path) -> None:
    dataset = build(prefix, tmp_path / "cache", mask_end_of_document=True)
    (batch,) = source(dataset, global_batch_size=32, micro_batch_size=32).microbatches(0)
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
    whole = build(prefix, tmp_path / "cache", num_samples=100_000, repeat=False)
    assert len(small) == 20
    assert len(whole) == (whole.num_tokens - 1) // 16
    assert whole.epochs < 1
    assert torch.equal(all_tokens(small), all_tokens(whole)[:20])


def test_a_sequence_longer_than_the_data_is_refused(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "train", [[5] * 9, [6] * 7])
    with pytest.raises(
        ConfigError,
        match=r"data.train: .*train has 16 tokens, but one sample needs batch.sequence_length \+ 1 = 17",
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
    alone = [all_tokens(build(paths, tmp_path / "alone")) for paths in (prefix, [prefix, other])]
    request.getfixturevalue("world_of_one")
    grouped = [
        all_tokens(build(paths, tmp_path / "grouped")) for paths in (prefix, [prefix, other])
    ]
    assert all(torch.equal(one, two) for one, two in zip(alone, grouped, strict=True))


def test_importing_the_package_imports_neither_torch_nor_megatron() -> None:
    program = "import sys, megatron_kd.data.indexed, megatron_kd.data.tokenizer; assert not {'torch', 'megatron'} & set(sys.modules)"
    subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        check=True,
        timeout=120,
    )


def source(dataset: TokenDataset, rank: int = 0, size: int = 1, **changes: object) -> BatchSource:
    settings: dict[str, object] = dict(
        global_batch_size=12, micro_batch_size=2, vocab_size=VOCAB, device="cpu"
    )
    return BatchSource(
        dataset, data_parallel_rank=rank, data_parallel_size=size, **(settings | changes)
    )  # type: ignore[arg-type]


def same(first: list[Microbatch], second: list[Microbatch]) -> bool:
    names = ("tokens", "labels", "loss_mask", "position_ids", "sample_ids")
    return len(first) == len(second) and all(
        torch.equal(getattr(one, name), getattr(two, name))
        for one, two in zip(first, second, strict=True)
        for name in names
    )


def test_microbatches_follow_the_documented_layout(train: TokenDataset) -> None:
    for rank in range(2):
        for number, batch in enumerate(source(train, rank, 2, micro_batch_size=3).microbatches(24)):
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
                for batch in source(train, rank, size, micro_batch_size=micro).microbatches(
                    consumed
                )
            ]
            ids = torch.cat([batch.sample_ids for batch in batches]).tolist()
            assert sorted(ids) == list(range(consumed, consumed + 12))
            tokens, labels = (
                torch.cat([batch.tokens for batch in batches]),
                torch.cat([batch.labels for batch in batches]),
            )
            for place, sample in enumerate(ids):
                assert torch.equal(tokens[place], expected[sample]["tokens"])
                assert torch.equal(labels[place], expected[sample]["labels"])


@pytest.mark.fault("S8")
def test_resuming_anywhere_gives_the_same_microbatches(train: TokenDataset) -> None:
    running = source(train, 1, 2)
    steps = {consumed: running.microbatches(consumed) for consumed in range(0, 96, 12)}
    for consumed in (0, 60, 24, 24, 36, 12, 84):
        assert same(steps[consumed], source(train, 1, 2).microbatches(consumed)), "a fresh source"
        assert same(steps[consumed], running.microbatches(consumed)), "the same source, moved"
    assert torch.equal(running.microbatches(5)[0].sample_ids, torch.tensor([7, 8])), (
        "any position, not only whole steps"
    )


def test_the_end_of_the_data_is_an_error_or_filled(train: TokenDataset) -> None:
    with pytest.raises(
        ConfigError, match="data.train has 96 samples, but samples 90 to 101 were asked for"
    ):
        source(train).microbatches(90)
    with pytest.raises(ConfigError):
        source(train).microbatches(-12)
    assert source(train, global_batch_size=10).num_batches == 9
    padded = source(train, global_batch_size=10, pad_last=True)
    assert padded.num_batches == 10
    last = padded.microbatches(90)
    assert torch.cat([batch.sample_ids for batch in last]).tolist() == [
        90,
        91,
        92,
        93,
        94,
        95,
        -1,
        -1,
        -1,
        -1,
    ]
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
        source(train, vocab_size=881, global_batch_size=1, micro_batch_size=1).microbatches(bad)


class FailsAt:
    """A dataset one sample of which cannot be read."""

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


def test_reading_ahead_raises_at_the_step_that_needs_it(train: TokenDataset) -> None:
    failing = source(FailsAt(train, 20))  # type: ignore[arg-type]
    failing.microbatches(0)
    with pytest.raises(OSError, match="sample 20 is gone"):
        failing.microbatches(12)
    assert len(failing.microbatches(24)) == 6


def test_batch_sizes_must_divide(train: TokenDataset) -> None:
    with pytest.raises(
        ConfigError, match="global_batch_size .12. must be a multiple of .* = 2 \\* 5 = 10"
    ):
        source(train, 0, 5)
