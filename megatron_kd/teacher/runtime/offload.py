"""Keep a frozen teacher's weights in CPU memory while the student needs the accelerator."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class OffloadedWeights:
    """Hold parameters in CPU memory and on `device` inside `with`.

    The weights are frozen, so dropping the device copy is enough to return. The copies are made in
    the order of the layers, behind the work that runs on the device. The price is the bytes of the
    weights once per step on the bus, and pinned CPU memory for them.
    """

    def __init__(self, models: Sequence[torch.nn.Module], device: torch.device) -> None:
        self.device = device
        # A tied head is one parameter with the embedding, and is copied once.
        weights = list(dict.fromkeys(weight for model in models for weight in model.parameters()))
        self._cpu_copies = [(weight, self._copy_to_cpu(weight.data)) for weight in weights]
        self._use_cpu_copies()

    def _copy_to_cpu(self, data: torch.Tensor) -> torch.Tensor:
        pinned = self.device.type == "cuda"
        return torch.empty(data.shape, dtype=data.dtype, pin_memory=pinned).copy_(data)

    def __enter__(self) -> None:
        for weight, cpu_copy in self._cpu_copies:
            weight.data = cpu_copy.to(self.device, non_blocking=True, copy=True)

    def __exit__(self, *exception: object) -> None:
        self._use_cpu_copies()

    def _use_cpu_copies(self) -> None:
        for weight, cpu_copy in self._cpu_copies:
            weight.data = cpu_copy
