"""A frozen teacher's weights out of the accelerator's memory while the student needs it."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch


class Offloaded:
    """Parameters that lie in CPU memory and are on `device` inside `with`.

    They are frozen: coming back is dropping the copy. The copies go over in the order of the layers behind whatever runs on the
    device. Costs the bytes of the weights once each way on the bus a step, and pinned CPU memory for them.
    """

    def __init__(self, models: Sequence[torch.nn.Module], device: torch.device) -> None:
        self.device = device
        # A tied head is one parameter with the embedding, and comes once.
        weights = list(dict.fromkeys(weight for model in models for weight in model.parameters()))
        self._home = [(weight, self._copy_home(weight.data)) for weight in weights]
        self._put_home()

    def _copy_home(self, data: torch.Tensor) -> torch.Tensor:
        return torch.empty(
            data.shape, dtype=data.dtype, pin_memory=self.device.type == "cuda"
        ).copy_(data)

    def __enter__(self) -> None:
        for weight, home in self._home:
            weight.data = home.to(self.device, non_blocking=True, copy=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._put_home()

    def _put_home(self) -> None:
        for weight, home in self._home:
            weight.data = home
