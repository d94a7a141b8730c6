"""Test that token files are Megatron's, and that damaged ones are refused."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_kd.config import ConfigError
from megatron_kd.data.prefix_samples import quiet_megatron
from megatron_kd.data.preparation.token_file_writer import TokenFileWriter
from megatron_kd.data.token_file_checks import check_token_file
from tests.data.token_data import EOD, VOCAB, overwrite, random_documents, write_tokens


def test_token_files_are_byte_identical_to_megatrons(tmp_path: Path) -> None:
    with quiet_megatron():
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    documents = random_documents(20)
    for dtype in (np.uint16, np.int32):
        prefix = write_tokens(tmp_path / f"kd_{dtype.__name__}", documents, np.dtype(dtype).str)
        megatron = str(tmp_path / f"megatron_{dtype.__name__}")
        builder = IndexedDatasetBuilder(f"{megatron}.bin", dtype=dtype)
        for tokens in documents:
            builder.add_document(np.array(tokens), [len(tokens)])
        builder.finalize(f"{megatron}.idx")
        for ending in (".bin", ".idx"):
            assert Path(prefix + ending).read_bytes() == Path(megatron + ending).read_bytes()
        file = check_token_file(megatron, vocab_size=VOCAB)
        assert file.num_tokens == sum(map(len, documents))
        assert file.num_documents == 20
        assert file.dtype == np.dtype(dtype)


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
    file = check_token_file(path, vocab_size=9, tokenizer_digest="abc")
    assert (file.num_tokens, file.num_documents, file.dtype) == (9, 3, np.dtype(np.uint16))
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
def test_ids_outside_the_vocabulary_are_located(dtype: str, bad: int, tmp_path: Path) -> None:
    documents = random_documents(10)
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
    for position, is_read in ((0, True), (9_999, True), (5, True), (30, False)):
        Path(f"{path}.bin").write_bytes(np.full(10_000, 5, "<u2").tobytes())
        overwrite(f"{path}.bin", 2 * position, b"\xff\xff")
        if is_read:
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
