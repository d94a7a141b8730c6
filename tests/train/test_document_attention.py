"""Tokens see their own document only: in every layout, in the samples' names, and with loss only where it counts."""

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
from megatron_kd.targets.keys import mark_starts, sample_key, unmark_starts
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
    """Document i holds the id i only, in random lengths, some much longer than a sample."""
    return [np.full(rng.choice([1, 2, 5, 11, 24, 25, 70]), number + 1) for number in range(count)]


def build(prefix: str, tmp_path: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = dict(
        num_samples=20,
        sequence_length=LENGTH,
        seed=5,
        index_cache=tmp_path / "cache",
        end_of_document=None,
        vocab_size=VOCAB,
    )
    return build_dataset(
        DatasetRequest(prefixes=[prefix], **(settings | {"within_documents": True} | changes))
    )


def batches_of(dataset: Any, size: int = 2) -> list[Microbatch]:
    source = BatchSource(dataset, BatchLayout(size, size), vocab_size=VOCAB, device="cpu")
    return [
        batch
        for consumed in range(0, len(dataset) // size * size, size)
        for batch in source.microbatches(consumed)
    ]


def test_documents_positions_and_masks_follow_the_index(tmp_path: Path) -> None:
    documents = numbered_documents(np.random.default_rng(fresh_seed()))
    dataset = build(
        write(tmp_path / "a", documents), tmp_path, num_samples=sum(map(len, documents)) // LENGTH
    )
    seen = 0
    for batch in batches_of(dataset, 1):
        mask = batch.attention_mask()
        assert batch.documents is not None
        assert mask is not None
        tokens, documents_of = batch.tokens[0], batch.documents[0]
        same = tokens.unsqueeze(1) == tokens.unsqueeze(0)
        assert torch.equal(mask[0, 0], same & torch.ones_like(same).tril()), (
            "tokens of one id are one document"
        )
        for place in range(LENGTH):
            first = next(at for at in range(LENGTH) if tokens[at] == tokens[place])
            assert batch.position_ids[0, place] == place - first
        seen += int(documents_of.max())
    assert seen > 20
    across = batches_of(
        build(write(tmp_path / "a", documents), tmp_path, within_documents=False), 1
    )[0]
    assert across.documents is None
    assert across.attention_mask() is None
    assert torch.equal(across.position_ids[0], torch.arange(LENGTH))


def test_names_tell_where_documents_begin(tmp_path: Path) -> None:
    rng = np.random.default_rng(fresh_seed())
    tokens = torch.from_numpy(rng.integers(0, 2**31 - 1, 50))
    starts = torch.from_numpy(rng.random(50) < 0.3)
    ids, found = unmark_starts(mark_starts(tokens, starts))
    assert torch.equal(ids, tokens)
    assert torch.equal(found, starts)
    named = mark_starts(tokens, starts).view(1, -1)
    for within in (
        True,
        False,
    ):  # what a cache is asked for by the forward pass is what the sample is called
        given = named if within else tokens.view(1, -1)
        batch = Microbatch.of(
            given, given, torch.ones(given.shape), torch.tensor([0]), within_documents=within
        )
        assert torch.equal(batch.marked_tokens, given)
        assert torch.equal(batch.tokens, tokens.view(1, -1))
    assert sample_key(mark_starts(tokens, starts)) != sample_key(tokens)
    assert torch.equal(mark_starts(tokens, starts & False), tokens)
    # The same tokens in one document and in five of the same length, which any order of documents leaves as they are.
    stream = np.full(200, 7)
    for within in (False, True):
        whole, several = (
            build(
                write(tmp_path / name, parts),
                tmp_path,
                num_samples=1,
                repeat=False,
                within_documents=within,
            )[0]["marked_tokens"]
            for name, parts in (("one", [stream]), ("several", [stream[:10]] * 20))
        )
        assert torch.equal(whole.abs() if not within else whole, torch.full((LENGTH,), 7))
        assert (sample_key(whole) == sample_key(several)) != within


def test_roles_mask_labels_and_begin_documents(tmp_path: Path) -> None:
    """Labels count where the byte of their own token says so, wherever the sample is cut and whatever order sequences come in."""
    rng = np.random.default_rng(fresh_seed())
    documents = [rng.integers(1, VOCAB, LENGTH) for _ in range(9)]
    prefix = write(tmp_path / "a", documents)
    roles = rng.integers(0, 4, 9 * LENGTH).astype(np.uint8)
    roles.tofile(f"{prefix}.roles")
    check_token_file(prefix, vocab_size=VOCAB)
    dataset = build(prefix, tmp_path, num_samples=8)
    stream, positions = np.concatenate(documents), set()
    for sample in range(8):
        row = dataset[sample]
        tokens, starts = unmark_starts(row["marked_tokens"])
        (at,) = [
            at
            for at in range(0, 9 * LENGTH, LENGTH)
            if np.array_equal(stream[at : at + LENGTH], tokens.numpy())
        ]
        positions.add(at)
        own = roles[at : at + LENGTH]
        assert np.array_equal(
            row["loss_mask"][:-1].numpy(), (own[1:] & COUNTS_FOR_LOSS != 0).astype(np.float32)
        )
        assert np.array_equal(starts[1:].numpy(), own[1:] & STARTS_DOCUMENT != 0)
        assert not starts[0]
    assert len(positions) == 8
    batch = batches_of(dataset, 1)[0]
    assert torch.equal(batch.labels == -100, batch.loss_mask == 0)
    roles[:-1].tofile(f"{prefix}.roles")
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
    first, second = rng.integers(0, VOCAB, 10).tolist(), rng.integers(0, VOCAB, 14).tolist()
    own = ([*second, *first], [0] * 14 + [1] * 10), ([*first, *second], [0] * 10 + [1] * 14)

    def config(name: str, attention: str, **over: Any) -> Any:
        return tiny(
            tmp_path / name,
            "none",
            data={"document_attention": attention},
            batch={"global_batch_size": 4, "micro_batch_size": 1},
            **over,
        )

    pair = list(own)
    single = [(config("within", "within"), pair), (config("across", "across"), pair)]
    within, across = run_ranks(hidden_states, 1, single)[0]
    # Each document stands first in one sequence and second in the other.
    for one, other, size in ((within[0], within[1], 14), (within[1], within[0], 10)):
        assert torch.allclose(one[:size], other[-size:], atol=2e-5)
        assert torch.allclose(one[:size], across[0 if size == 14 else 1][:size], atol=2e-5), (
            "nothing in front: both are the same"
        )
    assert not torch.allclose(across[0][:14], across[1][-14:], atol=1e-2), (
        "across documents the one in front is seen"
    )
    # The last rank holds all of the last stage's output, or under sequence parallelism the last rows of it.
    jobs = [(config(name, "within", **over), pair) for name, over in LAYOUTS.items()]
    for name, found in zip(LAYOUTS, run_ranks(hidden_states, 2, jobs)[1], strict=True):
        assert len(found) == 2
        for rows, expected in zip(found, within, strict=True):
            assert len(rows) == (LENGTH // 2 if name == "tp2_sp" else LENGTH)
            assert torch.allclose(rows, expected[-len(rows) :], atol=2e-5), name
