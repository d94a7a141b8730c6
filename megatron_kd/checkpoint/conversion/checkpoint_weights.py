"""Read whole weight tensors of a megatron-core checkpoint by name and layer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_kd.checkpoint.tensors import TensorReader
from megatron_kd.config import ConfigError, ModelSection
from megatron_kd.models.huggingface.tensor_names import (
    TensorMapping,
    huggingface_shapes,
    tensor_mappings,
)


class CheckpointWeights:
    """Read the weights of a model from a megatron-core checkpoint.

    Layers may be stacked in one tensor ("decoder.layers.mlp...", as this package writes them) or
    stored one by one ("decoder.layers.3.mlp...").

    Args:
        folder: the checkpoint folder.
        model: the model that it must hold.
        vocab_size: true number of ids; the stored vocabulary may be padded.
        setting: name of the checkpoint in error messages.

    Raises:
        ConfigError: a tensor of the model is missing or has another shape.
    """

    def __init__(self, folder: Path, model: ModelSection, vocab_size: int, *, setting: str) -> None:
        self.model, self.vocab_size, self._what = model, vocab_size, setting
        self.reader = TensorReader(folder, setting=setting)
        for mapping, layer in tensor_mappings(model):
            self._check(mapping, layer)

    def read(self, mapping: TensorMapping, layer: int | None) -> Tensor:
        """Return one tensor in its stored type, without the padding of the vocabulary."""
        name, stacked = self._name(mapping, layer)
        shape = self.shape(mapping)
        if layer is not None and stacked:
            return self.reader.read(name, (layer, *[0] * len(shape)), (1, *shape)).view(shape)
        return self.reader.read(name, [0] * len(shape), shape)

    def dtypes(self) -> set[torch.dtype]:
        """Return the types of the model's tensors."""
        return {
            self.reader.tensors[self._name(mapping, layer)[0]].dtype
            for mapping, layer in tensor_mappings(self.model)
        }

    def shape(self, mapping: TensorMapping) -> tuple[int, ...]:
        """Return the shape of a tensor of one layer, without the padding of the vocabulary."""
        parts = huggingface_shapes(mapping, self.model, self.vocab_size)
        return (sum(part[0] for part in parts), *parts[0][1:])

    def _name(self, mapping: TensorMapping, layer: int | None) -> tuple[str, bool]:
        """Return the stored name of a tensor, and whether all layers are stacked under it."""
        single = mapping.megatron_name.replace("decoder.layers.", f"decoder.layers.{layer}.")
        if layer is not None and single in self.reader.tensors:
            return single, False
        return mapping.megatron_name, True

    def _check(self, mapping: TensorMapping, layer: int | None) -> None:
        name, stacked = self._name(mapping, layer)
        tensor = self.reader.tensors.get(name)
        if tensor is None:
            raise ConfigError(
                f"{self._what}: {self.reader.folder} lacks {name}: "
                "the checkpoint is not of this model"
            )
        shape = self.shape(mapping)
        expected = (self.model.num_layers, *shape) if layer is not None and stacked else shape
        if mapping.kind == "vocabulary":
            fits = tensor.shape[1:] == expected[1:] and tensor.shape[0] >= expected[0]
        else:
            fits = tensor.shape == expected
        if not fits:
            raise ConfigError(
                f"{self._what}: {name} has shape {list(tensor.shape)}, "
                f"but the model says {list(expected)}"
            )
