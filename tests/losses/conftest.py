"""Provide fixtures for the tests of the losses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Use one thread: the tensors are tiny, and waiting threads cost more than the arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make "auto" keep no logits, and blocks of a dense teacher a few tokens long."""
    monkeypatch.setattr("megatron_kd.head.sizes.SAVED_LOGITS_CPU", 0)
    monkeypatch.setattr("megatron_kd.losses.dense_loss.BLOCK_CPU", 3 * 96)
