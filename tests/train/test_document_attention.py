"""Restrict attention to the document of a token, in every layout, in keys and in the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_kd.config import ConfigError
from megatron_kd.data.batches import BatchLayout, BatchSource, Microbatch
from megatron_kd.data.dataset import DatasetRequest, build_dataset
from megatron_kd.data.preparation.token_file_writer import TokenFileWriter
from megatron_kd.data.token_file_checks import check_token_file
from megatron_kd.data.token_files import COUNTS_FOR_LOSS, STARTS_DOCUMENT
from megatron_kd.targets.sample_keys import mark_starts, sample_key, unmark_starts
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import VOCAB, tiny
from tests.losses.cases import fresh_seed
from tests.train.documents import hidden_states

LENGTH = 24


def write(prefix: Path, documents: list[np.ndarray]) -> str:
    with TokenFileWriter(prefix, np.dtype("<u2")) as writer:
        writer.add(np.concatenate(documents), np.array([len(ids) for ids in documents]))
        writer.commit(tokenizer_digest="ab", vocab_size=VOCAB)
    return str(prefix)


def numbered_documents(rng: np.random.Generator, count: int = 40) -> list[np.ndarray]:
    """Make documents of random lengths, some much longer than a sample, each of one id only."""
    return [np.full(rng.choice([1, 2, 5, 11, 24, 25, 70]), number + 1) for number in range(count)]


def build(prefix: str, tmp_path: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = dict(
        num_samples=20,
        sequence_length=LENGTH,
        seed=5,
        index_cache=tmp_path / "cache",
        end_of_document=None,
        vocab_size=VOCAB,
        within_documents=True,
    )
    return build_dataset(DatasetRequest(prefixes=[prefix], **(settings | changes)))


def batches_of(dataset: Any, size: int = 2) -> list[Microbatch]:
    source = BatchSource(dataset, BatchLayout(size, size), vocab_size=VOCAB, device="cpu")
    return [
        batch
        for consumed in range(0, len(dataset) // size * size, size)
        for batch in source.microbatches(consumed)
    ]


def test_documents_positions_and_masks_follow_the_index(tmp_path: Path) -> None:
    documents = numbered_documents(np.random.default_rng(fresh_seed()))
    num_samples = sum(map(len, documents)) // LENGTH
    dataset = build(write(tmp_path / "a", documents), tmp_path, num_samples=num_samples)
    num_boundaries = 0
    for batch in batches_of(dataset, 1):
        mask = batch.attention_mask()
        assert batch.documents is not None
        assert mask is not None
        tokens = batch.tokens[0]
        same_document = tokens.unsqueeze(1) == tokens.unsqueeze(0)
        causal = torch.ones_like(same_document).tril()
        assert torch.equal(mask[0, 0], same_document & causal), "a document has one id only"
        for position in range(LENGTH):
            start = next(i for i in range(LENGTH) if tokens[i] == tokens[position])
            assert batch.position_ids[0, position] == position - start
        num_boundaries += int(batch.documents[0].max())
    assert num_boundaries > 20


def test_attention_across_documents_has_no_mask(tmp_path: Path) -> None:
    documents = numbered_documents(np.random.default_rng(fresh_seed()))
    dataset = build(write(tmp_path / "a", documents), tmp_path, within_documents=False)
    batch = batches_of(dataset, 1)[0]
    assert batch.documents is None
    assert batch.attention_mask() is None
    assert torch.equal(batch.position_ids[0], torch.arange(LENGTH))


def test_marks_of_document_starts(tmp_path: Path) -> None:
    rng = np.random.default_rng(fresh_seed())
    tokens = torch.from_numpy(rng.integers(0, 2**31 - 1, 50))
    starts = torch.from_numpy(rng.random(50) < 0.3)
    marked_tokens = mark_starts(tokens, starts)
    unmarked_tokens, unmarked_starts = unmark_starts(marked_tokens)
    assert torch.equal(unmarked_tokens, tokens)
    assert torch.equal(unmarked_starts, starts)
    assert sample_key(marked_tokens) != sample_key(tokens)
    assert torch.equal(mark_starts(tokens, starts & False), tokens)
    # The forward pass asks a cache for the tokens that the key of the sample was made of.
    for within in (True, False):
        sample = (marked_tokens if within else tokens).view(1, -1)
        batch = Microbatch.of(
            sample, sample, torch.ones(sample.shape), torch.tensor([0]), within_documents=within
        )
        assert torch.equal(batch.marked_tokens, sample)
        assert torch.equal(batch.tokens, tokens.view(1, -1))


@pytest.mark.parametrize("within", [False, True])
def test_keys_tell_where_documents_begin(within: bool, tmp_path: Path) -> None:
    """Compare the same tokens in one document and in twenty of the same length, in any order."""
    stream = np.full(200, 7)
    one_document, many_documents = (
        build(
            write(tmp_path / name, documents),
            tmp_path,
            num_samples=1,
            repeat=False,
            within_documents=within,
        )[0]["marked_tokens"]
        for name, documents in (("one", [stream]), ("many", [stream[:10]] * 20))
    )
    ids = one_document if within else one_document.abs()
    assert torch.equal(ids, torch.full((LENGTH,), 7))
    assert (sample_key(one_document) == sample_key(many_documents)) != within


def test_roles_mask_labels_and_begin_documents(tmp_path: Path) -> None:
    """Count a label if the byte of its token says so, in any order of samples."""
    rng = np.random.default_rng(fresh_seed())
    documents = [rng.integers(1, VOCAB, LENGTH) for _ in range(9)]
    prefix = write(tmp_path / "a", documents)
    roles = rng.integers(0, 4, 9 * LENGTH).astype(np.uint8)
    roles.tofile(f"{prefix}.roles")
    check_token_file(prefix, vocab_size=VOCAB)
    dataset = build(prefix, tmp_path, num_samples=8)
    stream, offsets = np.concatenate(documents), set()
    for number in range(8):
        sample = dataset[number]
        tokens, starts = unmark_starts(sample["marked_tokens"])
        (offset,) = [
            offset
            for offset in range(0, 9 * LENGTH, LENGTH)
            if np.array_equal(stream[offset : offset + LENGTH], tokens.numpy())
        ]
        offsets.add(offset)
        label_roles = roles[offset + 1 : offset + LENGTH]
        counts = (label_roles & COUNTS_FOR_LOSS != 0).astype(np.float32)
        assert np.array_equal(sample["loss_mask"][:-1].numpy(), counts)
        assert np.array_equal(starts[1:].numpy(), label_roles & STARTS_DOCUMENT != 0)
        assert not starts[0]
    assert len(offsets) == 8
    batch = batches_of(dataset, 1)[0]
    assert torch.equal(batch.labels == -100, batch.loss_mask == 0)


def test_truncated_roles_are_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [np.ones(LENGTH, dtype=np.int64)])
    np.zeros(LENGTH - 1, dtype=np.uint8).tofile(f"{prefix}.roles")
    with pytest.raises(ConfigError, match="roles is truncated"):
        check_token_file(prefix, vocab_size=VOCAB)


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_sp": {"parallel": {"tensor": 2, "sequence_parallel": True}},
    "pp2_vp2": {"parallel": {"pipeline": 2, "virtual_pipeline": 2}},
    "recompute": {"parallel": {"tensor": 2}, "model": {"recompute": "full"}},
}


@pytest.mark.dist
def test_a_packed_document_is_the_document_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(fresh_seed())
    short, long = rng.integers(0, VOCAB, 10).tolist(), rng.integers(0, VOCAB, 14).tolist()
    # Each document is first in one sequence and second in the other.
    sequences = [([*long, *short], [0] * 14 + [1] * 10), ([*short, *long], [0] * 10 + [1] * 14)]

    def config(name: str, attention: str, **overrides: Any) -> Any:
        return tiny(
            tmp_path / name,
            "none",
            data={"document_attention": attention},
            batch={"global_batch_size": 4, "micro_batch_size": 1},
            **overrides,
        )

    jobs = [(config(attention, attention), sequences) for attention in ("within", "across")]
    within, across = run_ranks(hidden_states, 1, jobs)[0]
    for number, size in ((0, 14), (1, 10)):
        first_states, second_states = within[number][:size], within[1 - number][-size:]
        assert torch.allclose(first_states, second_states, atol=2e-5)
        assert torch.allclose(first_states, across[number][:size], atol=2e-5), (
            "no document is before it: both kinds of attention are the same"
        )
    assert not torch.allclose(across[0][:14], across[1][-14:], atol=1e-2), (
        "attention across documents sees the document before"
    )

    # The last rank has the output of the last stage; under sequence parallelism the last tokens.
    jobs = [(config(name, "within", **overrides), sequences) for name, overrides in LAYOUTS.items()]
    for name, states in zip(LAYOUTS, run_ranks(hidden_states, 2, jobs)[1], strict=True):
        assert len(states) == 2
        for output, reference in zip(states, within, strict=True):
            assert len(output) == (LENGTH // 2 if name == "tp2_sp" else LENGTH)
            assert torch.allclose(output, reference[-len(output) :], atol=2e-5), name
