"""Run the kernels compiled where there is a GPU, else in Triton's interpreter on CPU tensors.

Triton decides that when it is imported, so it is imported here, with the variable set meanwhile.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch

INTERPRETED = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}

if importlib.util.find_spec("triton") is None:  # a system that triton does not support
    collect_ignore_glob = ["test_*.py"]
else:
    with patch.dict("os.environ", INTERPRETED):
        from megatron_kd.head import triton_kernels


@pytest.fixture(autouse=True, scope="package")
def _kernels() -> Iterator[None]:
    """Use one thread, for tiny tensors, and no kernel that a CPU could not run."""
    interpreted = type(triton_kernels.tile_kernel).__name__ == "InterpretedFunction"
    assert interpreted != torch.cuda.is_available(), (
        "triton was imported before tests/head/kernels: run these tests alone"
    )
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with patch.dict("os.environ", INTERPRETED):
        yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use small blocks, so that a row has several."""
    from megatron_kd.head import triton_rows

    for name, size in (("TILES", 4), ("MERGE", 4), ("IDS", 4), ("BLOCK", 64)):
        monkeypatch.setattr(triton_rows, name, size)
