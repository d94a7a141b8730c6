"""Record the outputs of chosen layers during a forward pass, with hooks.

The forward pass and the code of megatron-core stay unchanged.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor


class LayerOutputs:
    """Record the outputs of some layers of this rank's chunks.

    An output is the residual stream [S, B, H]; under sequence parallelism it is this rank's slice
    of S.

    Args:
        chunks: the model chunks of this rank.
        layers: layer numbers, counted from 1 over the whole model. Layers of other ranks are
            ignored.

    Attributes:
        local_layers: those of the layers that are on this rank.
    """

    def __init__(self, chunks: Sequence[GPTModel], layers: Collection[int]) -> None:
        self._outputs: dict[int, Tensor] | None = None
        self._layers = set(layers)
        self.local_layers: set[int] = set()
        for chunk in chunks:
            self.local_layers |= self.layers_in(chunk)
            for layer in chunk.decoder.layers:
                if layer.layer_number in self._layers:
                    layer.register_forward_hook(self._store)

    def layers_in(self, chunk: GPTModel) -> set[int]:
        """Return those of the layers that a chunk holds."""
        return {layer.layer_number for layer in chunk.decoder.layers} & self._layers

    @contextmanager
    def record(self) -> Iterator[dict[int, Tensor]]:
        """Yield a dictionary that one chunk's forward pass fills: layer number -> output.

        Under activation recomputation these are the tensors of the outer graph. What runs again in
        the backward pass is not recorded, because no recording is active then.
        """
        outputs = self._outputs = {}
        try:
            yield outputs
        finally:
            self._outputs = None

    def _store(self, layer: Any, _arguments: Any, output: tuple[Tensor, Any]) -> None:
        if self._outputs is not None:
            self._outputs[layer.layer_number] = output[0]
