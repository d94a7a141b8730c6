"""Convert the weights of a checkpoint that another megatron-core program wrote."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_kd.checkpoint.conversion.checkpoint_weights import CheckpointWeights
from megatron_kd.checkpoint.conversion.output import PRECISIONS, commit_checkpoint, pad_vocabulary
from megatron_kd.checkpoint.tensors import TensorSlice
from megatron_kd.config import ModelSection
from megatron_kd.models.huggingface.tensor_names import TensorMapping, tensor_mappings
from megatron_kd.parallel.vocab_shards import padded_vocab_size


def adopt_checkpoint(
    folder: Path,
    model: ModelSection,
    output: Path,
    *,
    tokenizer: str | None,
    files: Mapping[str, bytes] | None = None,
    setting: str = "input",
) -> Path:
    """Write the weights of another program's megatron-core checkpoint as one of this package.

    Only weights are taken. Their shapes are checked, and the vocabulary is padded as in a run.

    Args:
        folder: the other program's checkpoint.
        model: the model that it holds, with its vocabulary size.
        output: new run directory; must not exist.
        tokenizer: digest of the vocabulary, or None.
        files: further files of `output`, name -> content.
        setting: name of `folder` in error messages.

    Returns:
        The step folder, `output`/checkpoints/step-00000000.

    Raises:
        ConfigError: the checkpoint does not hold this model, or `output` exists.
    """
    assert model.vocab_size is not None
    weights = CheckpointWeights(folder, model, model.vocab_size, setting=setting)
    precision = "bf16" if weights.dtypes() == {torch.bfloat16} else "fp32"
    slices = [
        _tensor_slice(weights, mapping, layer, PRECISIONS[precision])
        for mapping, layer in tensor_mappings(model)
    ]
    return commit_checkpoint(
        output, model, slices, precision=precision, tokenizer=tokenizer, files=files
    )


def _tensor_slice(
    weights: CheckpointWeights, mapping: TensorMapping, layer: int | None, dtype: torch.dtype
) -> TensorSlice:
    model, shape = weights.model, weights.shape(mapping)
    if mapping.kind == "vocabulary":
        padded = padded_vocab_size(weights.vocab_size, model.vocab_size_multiple)
        load = partial(_read_padded, weights, mapping, padded)
        return TensorSlice(
            mapping.megatron_name, (padded, shape[1]), (0, 0), (padded, shape[1]), dtype, load
        )
    if layer is None:
        load = partial(weights.read, mapping, None)
        return TensorSlice(mapping.megatron_name, shape, (0,) * len(shape), shape, dtype, load)
    full_shape, offset = (model.num_layers, *shape), (layer, *[0] * len(shape))
    load = partial(_read_layer, weights, mapping, layer)
    return TensorSlice(mapping.megatron_name, full_shape, offset, (1, *shape), dtype, load)


def _read_padded(weights: CheckpointWeights, mapping: TensorMapping, padded_size: int) -> Tensor:
    return pad_vocabulary(weights.read(mapping, None), weights.vocab_size, padded_size)


def _read_layer(weights: CheckpointWeights, mapping: TensorMapping, layer: int) -> Tensor:
    return weights.read(mapping, layer)[None]
