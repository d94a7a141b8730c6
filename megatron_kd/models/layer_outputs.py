"""What chosen layers of a model put out, seen in passing: its forward pass and megatron-core's code stay as they are."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor


class LayerOutputs:
    """The outputs of some layers of this rank's chunks: the residual stream [S, B, H] (under sequence parallelism its slice of S).

    layers: numbers counted from 1 over the whole model; those that are not on this rank are passed over. here: those that are.
    """

    def __init__(self, chunks: Sequence[GPTModel], layers: Collection[int]) -> None:
        self._seen: dict[int, Tensor] | None = None
        self._layers = set(layers)
        for layer in (
            layer
            for chunk in chunks
            for layer in chunk.decoder.layers
            if layer.layer_number in self._layers
        ):
            layer.register_forward_hook(self._see)
        self.here = set().union(*(self.on(chunk) for chunk in chunks))

    def on(self, chunk: GPTModel) -> set[int]:
        """Those of the layers that a chunk holds."""
        return {layer.layer_number for layer in chunk.decoder.layers} & self._layers

    @contextmanager
    def watching(self) -> Iterator[dict[int, Tensor]]:
        """Around one chunk's forward pass: layer number -> its output, filled as the layers run.

        Under activation recomputation these are the tensors of the outer graph, and what runs again in the backward pass is
        not seen: nobody is watching then.
        """
        seen = self._seen = {}
        try:
            yield seen
        finally:
            self._seen = None

    def _see(self, layer: Any, _arguments: Any, output: tuple[Tensor, Any]) -> None:
        if self._seen is not None:
            self._seen[layer.layer_number] = output[0]
