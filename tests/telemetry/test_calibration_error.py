"""Expected calibration error from sums, against the definition over single tokens in fp64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_kd.data.token_files import tokens_per_byte
from megatron_kd.telemetry.calibration_error import (
    BINS,
    FINE_BINS,
    adaptive_calibration_error,
    calibration_sums,
    expected_calibration_error,
)
from tests.losses.cases import fresh_seed


def plain_error(confidence: Tensor, hit: Tensor, bins: list[Tensor]) -> float:
    """Sum over bins (index tensors) of |mean hit - mean confidence|, weighted by size."""
    filled = [tokens for tokens in bins if len(tokens)]
    return sum(
        len(tokens) * abs(hit[tokens].double().mean() - confidence[tokens].mean()).item()
        for tokens in filled
    ) / len(confidence)


def test_errors_are_those_of_the_definition() -> None:
    """The model is overconfident at some confidences and underconfident at others.

    With wrong bins the errors would cancel.
    """
    generator = torch.Generator().manual_seed(fresh_seed())
    confidence = torch.rand(4000, generator=generator, dtype=torch.float64) ** 0.5
    true = (confidence + 0.25 * torch.sin(confidence * BINS * torch.pi)).clamp(0, 1)
    hit = torch.rand(4000, generator=generator) < true
    # In two batches, with tokens that do not count between them.
    weight = torch.ones(4000)
    dead = torch.rand(500, generator=generator).double()
    parts = [
        calibration_sums(confidence[:1500], hit[:1500], weight[:1500]),
        calibration_sums(dead, dead > 0.5, torch.zeros(500)),
    ]
    sums = sum(parts) + calibration_sums(confidence[1500:], hit[1500:], weight[1500:])
    edges = torch.arange(BINS + 1, dtype=torch.float64) / BINS
    wide = [
        ((confidence > low) & (confidence <= high)).nonzero()[:, 0]
        for low, high in zip(edges[:-1], edges[1:], strict=True)
    ]
    assert expected_calibration_error(sums) == pytest.approx(
        plain_error(confidence, hit, wide), abs=1e-9
    )
    order = confidence.argsort()
    even = [order[4000 * k // BINS : 4000 * (k + 1) // BINS] for k in range(BINS)]
    # A divided fine bin distributes its hits evenly: at most two tokens at each of 14 cuts are on
    # the wrong side.
    assert adaptive_calibration_error(sums) == pytest.approx(
        plain_error(confidence, hit, even), abs=2 * 2 * 14 / 4000
    )
    assert expected_calibration_error(sums) > 0.08


def test_known_errors() -> None:
    """Confident and always wrong: 1. Correct as often as confident: 0."""
    ones = torch.ones(64)
    wrong = calibration_sums(ones, torch.zeros(64, dtype=torch.bool), ones)
    assert expected_calibration_error(wrong) == 1.0
    assert adaptive_calibration_error(wrong) == pytest.approx(1.0)
    assert wrong[0, FINE_BINS - 1] == 64
    half = calibration_sums(ones / 2, torch.arange(64) % 2 == 0, ones)
    assert expected_calibration_error(half) == pytest.approx(0.0)
    assert adaptive_calibration_error(half) == pytest.approx(0.0)


def test_tokens_per_byte(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text('{"tokens": 100, "bytes": 400}')
    (tmp_path / "chats.json").write_text('{"tokens": 100, "bytes": 400, "packed_length": 32}')
    (tmp_path / "damaged.json").write_text('{"tokens": 100, "bytes": ')
    assert [
        tokens_per_byte(tmp_path / name) for name in ("text", "chats", "damaged", "absent")
    ] == [0.25, None, None, None]
