"""Test that a target survives encoding for any shape.

It is exact where that is promised, and within the stated error elsewhere.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_kd.cache.bits import join, split
from megatron_kd.cache.decode import decode, decode_many
from megatron_kd.cache.encode import encode
from megatron_kd.cache.sample_record import HEADER, BadRecordError
from megatron_kd.targets import SampleSelection, SparseTarget, TopSelection, select_targets
from megatron_kd.targets.sparse import check_target
from tests.losses.cases import fresh_seed, say

ERROR = (
    2 * 0.053
    # half the widest step, and the same again for the scaling; the step is wider by a second-order
    # term
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 31), max_size=300), st.integers(0, 2**32))
def test_numbers_come_back(powers: list[int], seed: int) -> None:
    """Check that numbers survive, and that the bits are where FORMAT.md says."""
    generator = np.random.default_rng(seed)
    numbers = np.array(
        [generator.integers(1 << power, 2 << power) for power in powers], dtype=np.int64
    )
    classes, data = split(numbers)
    assert np.array_equal(join(classes, [data], np.array([len(numbers)])), numbers)
    expected, start = 0, 0
    for number, kind in zip(numbers.tolist(), classes.tolist(), strict=True):
        power = number.bit_length() - 1
        assert kind == 2 * power + (power > 0 and number >> (power - 1) & 1)
        width = max(power - 1, 0)
        expected |= (number & ((1 << width) - 1)) << start
        start += width
    assert len(data) == (start + 7) // 8
    assert int.from_bytes(data, "little") == expected


def teacher(seed: int, *, tokens: int, vocab_size: int, spread: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    frequency = -torch.arange(1, vocab_size + 1).float().log()
    return frequency + spread * torch.randn(tokens, vocab_size, generator=generator)


def used(target: SparseTarget) -> list[dict[int, float]]:
    return [
        {int(i): float(v) for i, v in zip(ids, values, strict=True) if i >= 0}
        for ids, values in zip(target.indices, target.logprobs, strict=True)
    ]


@settings(max_examples=40, deadline=None)
# The example has two logits of one log-probability.
@example(tokens=2, vocab_size=70000, top_k=48, top_p=1.0, temperature=1.0, seed=33)
@given(
    st.integers(1, 40),
    st.sampled_from([1, 7, 2000, 70000]),
    st.integers(1, 70),
    st.floats(0.05, 1.0),
    st.sampled_from([1.0, 2.0]),
    st.integers(0, 2**31),
)
def test_top_targets(
    tokens: int, vocab_size: int, top_k: int, top_p: float, temperature: float, seed: int
) -> None:
    logits = teacher(seed, tokens=tokens, vocab_size=vocab_size, spread=3.0)
    target = select_targets(
        logits, TopSelection(min(top_k, vocab_size), top_p=top_p, temperature=temperature)
    )
    exact = decode(encode(target, value_encoding="fp32"))
    for actual, expected in zip(exact.tensors(), target.tensors(), strict=True):
        assert torch.equal(actual, expected)
        assert actual.dtype == expected.dtype
    assert (exact.temperature, exact.sampled) == (temperature, False)

    decoded = decode(encode(target))
    check_target(decoded, target.indices.shape[:1], vocab_size=vocab_size)
    assert decoded.temperature == temperature
    assert decoded.indices.shape == target.indices.shape
    assert torch.equal(decoded.log_tail, target.log_tail)
    assert (decoded.entropy - target.entropy).abs().max() <= 0.5 / 2048 + 1e-6
    for actual, expected in zip(used(decoded), used(target), strict=True):
        assert actual.keys() == expected.keys()
        assert max(abs(actual[i] - expected[i]) for i in actual) < ERROR
    mass, kept = (t.logprobs.double().exp().sum(1) for t in (decoded, target))
    assert torch.allclose(mass, kept, atol=2e-6)


def test_the_loss_of_quantization() -> None:
    """Check the mean KL from the exact kept distribution to the decoded one.

    It is 7e-5 where probabilities are large, and less where they are not.
    """
    seed = fresh_seed()
    for top_k, top_p, spread in ((50, 0.95, 2.5), (256, 1.0, 1.0), (8, 1.0, 4.0), (1000, 1.0, 0.0)):
        check_loss(
            seed,
            select_targets(
                teacher(seed, tokens=200, vocab_size=20000, spread=spread),
                TopSelection(top_k, top_p=top_p),
            ),
        )


def check_loss(seed: int, target: SparseTarget) -> None:
    decoded = decode(encode(target))
    order = torch.where(target.indices >= 0, target.indices, 2**31 - 1).argsort(dim=1, stable=True)
    exact = target.logprobs.gather(1, order).double().log_softmax(1)
    read = decoded.logprobs.double().log_softmax(1)
    divergence = torch.where(exact > -torch.inf, exact.exp() * (exact - read), 0.0).sum(1)
    assert 0 <= divergence.mean() < 1e-4, say(
        seed, target.indices.shape[1], divergence.mean(), divergence.max()
    )
    assert divergence.max() < 1e-3, say(
        seed, target.indices.shape[1], divergence.mean(), divergence.max()
    )


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 80),
    st.sampled_from([1, 50, 30000]),
    st.sampled_from([1.0, 2.0]),
    st.integers(0, 2**31),
)
def test_samples_are_exact(
    tokens: int, draws: int, vocab_size: int, temperature: float, seed: int
) -> None:
    logits = teacher(seed, tokens=tokens, vocab_size=vocab_size, spread=3.0)
    target = select_targets(logits, SampleSelection(draws, seed, temperature))
    for encoding in ("quantized", "fp32"):
        decoded = decode(encode(target, value_encoding=encoding, num_draws=draws))
        assert decoded.sampled
        assert decoded.temperature == temperature
        assert decoded.log_tail is None
        assert torch.equal(decoded.indices, target.indices)
        assert torch.equal(decoded.logprobs, target.logprobs)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 20),
    st.sampled_from(["draws", "quantized", "fp32"]),
    st.integers(0, 2**31),
)
def test_many_records_at_once_equal_single_ones(
    count: int, tokens: int, kind: str, seed: int
) -> None:
    """Check records that differ in slots, entries, steps and samples."""
    generator = np.random.default_rng(seed)
    targets, data = [], []
    for number in range(count):
        logits = teacher(
            seed + number, tokens=tokens, vocab_size=3000, spread=float(generator.uniform(0.1, 4))
        )
        size = int(generator.integers(1, 40))
        selection = (
            SampleSelection(size, seed)
            if kind == "draws"
            else TopSelection(size, top_p=float(generator.uniform(0.3, 1)))
        )
        targets.append(select_targets(logits, selection))
        data.append(
            encode(
                targets[-1],
                value_encoding="fp32" if kind == "fp32" else "quantized",
                num_draws=size,
            )
        )
    batch = decode_many(data)
    slots = max(target.indices.shape[1] for target in targets)
    assert batch.indices.shape == (count, tokens, slots)
    for number, record in enumerate(data):
        single = decode(record)
        decoded = batch.map(lambda tensor, number=number: tensor[number])
        width = single.indices.shape[1]
        assert (decoded.indices[:, width:] == -1).all()
        assert (decoded.logprobs[:, width:] == -torch.inf).all()
        assert torch.equal(decoded.indices[:, :width], single.indices)
        assert torch.equal(decoded.logprobs[:, :width], single.logprobs)
        for name in ("log_tail", "entropy"):
            actual, expected = getattr(decoded, name), getattr(single, name)
            assert (actual is None and expected is None) or torch.equal(actual, expected)
    longer = encode(
        select_targets(teacher(seed, tokens=tokens + 1, vocab_size=50, spread=1.0), TopSelection(3))
    )
    with pytest.raises(BadRecordError, match="records of different kinds"):
        decode_many([*data, longer])


def test_invalid_targets_are_refused() -> None:
    def target(ids: list[list[int]], values: list[list[float]], **more: object) -> SparseTarget:
        return SparseTarget(
            torch.tensor(ids, dtype=torch.int32), torch.tensor(values).log(), **more
        )

    for invalid, message in (
        (target([[-1, -1]], [[0.5, 0.5]]), "has no kept entry"),
        (target([[1, 2]], [[0.5, float("nan")]]), "not a number"),
        (target([[3, 3]], [[0.5, 0.5]]), "named twice"),
        (target([[1, 2]], [[0.5, 0.25]], sampled=True), None),
        (target([[1, 2]], [[0.7, 0.3]], sampled=True), "not counts of 2 draws"),
    ):
        if message is None:
            continue
        with pytest.raises(ValueError, match=message):
            encode(invalid)
    with pytest.raises(
        ValueError, match="value_encoding must be one of quantized, fp32, not 'int4'"
    ):
        encode(target([[1]], [[1.0]]), value_encoding="int4")


def test_a_target_without_tail_or_entropy() -> None:
    target = SparseTarget(
        torch.tensor([[5, 2], [9, -1]], dtype=torch.int32),
        torch.tensor([[0.5, 0.25], [0.125, 0.0]]).log(),
    )
    for encoding in ("quantized", "fp32"):
        decoded = decode(encode(target, value_encoding=encoding))
        assert decoded.log_tail is None
        assert decoded.entropy is None
        for actual, expected in zip(used(decoded), used(target), strict=True):
            assert actual.keys() == expected.keys()
            assert max(abs(actual[i] - expected[i]) for i in actual) < ERROR
        assert torch.allclose(decoded.logprobs.exp().sum(1), torch.tensor([0.75, 0.125]), atol=1e-6)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_other_bytes_are_bad_records_or_targets(data: st.DataObject) -> None:
    """Check that a changed record gives BadRecordError or some target, never another error.

    The checksum that guards it is not used here.
    """
    target = select_targets(
        teacher(data.draw(st.integers(0, 9)), tokens=5, vocab_size=500, spread=2.0),
        TopSelection(9, top_p=0.9),
    )
    payload = bytearray(
        encode(target, value_encoding=data.draw(st.sampled_from(["quantized", "fp32"])))
    )
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "noise"]))
    if kind == "flip":
        payload[data.draw(st.integers(0, len(payload) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del payload[data.draw(st.integers(0, len(payload) - 1)) :]
    elif kind == "grow":
        payload += data.draw(st.binary(min_size=1, max_size=9))
    else:
        payload = bytearray(data.draw(st.binary(max_size=2 * HEADER.size)))
    try:
        decoded = decode(bytes(payload))
    except BadRecordError:
        return
    assert kind in ("flip", "noise")
    assert decoded.indices.dim() == 2
