"""Convert the weights of a Hugging Face folder into a checkpoint, one tensor at a time.

No model is built: a model of any size passes through the memory of its largest tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_kd.checkpoint.conversion.output import PRECISIONS, commit_checkpoint, pad_vocabulary
from megatron_kd.checkpoint.conversion.qkv import merge_qkv
from megatron_kd.checkpoint.tensors import TensorSlice
from megatron_kd.config import ConfigError, ModelSection
from megatron_kd.models.huggingface.config_json import model_from_config
from megatron_kd.models.huggingface.safetensors import SafetensorsFolder
from megatron_kd.models.huggingface.tensor_names import (
    IGNORED_SUFFIXES,
    TensorMapping,
    huggingface_names,
    huggingface_shapes,
    tensor_mappings,
)
from megatron_kd.parallel.vocab_shards import padded_vocab_size
from megatron_kd.storage.json_files import read_json


@dataclass(frozen=True)
class HuggingFaceSource:
    """Hold a checked Hugging Face folder.

    It has every tensor of the model, in its shape, and no other.

    Attributes:
        weights: the safetensors files.
        model: the model section that config.json stands for.
        config: content of config.json.
        precision: key of PRECISIONS, the type of the converted checkpoint.
    """

    weights: SafetensorsFolder
    model: ModelSection
    config: Mapping[str, Any]
    precision: str

    @property
    def vocab_size(self) -> int:
        """Return the true number of ids."""
        assert self.model.vocab_size is not None
        return self.model.vocab_size


def open_huggingface(
    folder: Path,
    *,
    vocab_size: int | None = None,
    vocab_size_multiple: int = 128,
    precision: str | None = None,
    setting: str = "input",
) -> HuggingFaceSource:
    """Read config.json and the headers of the safetensors files, and check that they agree.

    Args:
        folder: the Hugging Face folder.
        vocab_size: ids to keep; further rows of the embedding are padding that no tokenizer id
            uses. None: all rows.
        vocab_size_multiple: what the padded vocabulary of the checkpoint is a multiple of.
        precision: type of the checkpoint. None: bf16 where all weights are bf16, else fp32.
        setting: name of the folder in error messages.

    Returns:
        The checked folder. No weight has been read yet, except a tied output weight.

    Raises:
        ConfigError: the folder is incomplete or is not of one supported model.
    """
    weights = SafetensorsFolder(folder, setting=setting)
    config = read_json(folder / "config.json", setting=setting)
    model = model_from_config(config, setting=setting)
    embedding_rows = model.vocab_size
    assert embedding_rows is not None
    if vocab_size is not None and not 1 < vocab_size <= embedding_rows:
        raise ConfigError(
            f"{setting}: the requested vocabulary size ({vocab_size}) must be in "
            f"[2, {embedding_rows}], the rows of the embedding"
        )
    _check_tensors(weights, model, embedding_rows, setting)
    model = model.model_copy(
        update={
            "vocab_size": vocab_size or embedding_rows,
            "vocab_size_multiple": vocab_size_multiple,
        }
    )
    if precision is None:
        types = {
            weights.tensors[name].dtype
            for mapping, layer in tensor_mappings(model)
            for name in huggingface_names(mapping, layer)
        }
        precision = "bf16" if types == {torch.bfloat16} else "fp32"
    return HuggingFaceSource(weights, model, config, precision)


def _check_tensors(
    weights: SafetensorsFolder, model: ModelSection, vocab_size: int, setting: str
) -> None:
    if model.num_layers > len(weights.tensors):
        # Checked before anything is allocated per layer: config.json may hold any number.
        raise ConfigError(
            f"{setting}: config.json says {model.num_layers} layers, but {weights.folder} holds "
            f"only {len(weights.tensors)} tensors: they are not of one model, or files are missing"
        )
    expected = {
        name: shape
        for mapping, layer in tensor_mappings(model)
        for name, shape in zip(
            huggingface_names(mapping, layer),
            huggingface_shapes(mapping, model, vocab_size),
            strict=True,
        )
    }
    _check_names(weights, expected, tied=model.tied_embeddings, setting=setting)
    for name, shape in expected.items():
        tensor = weights.tensors[name]
        if tensor.shape != shape:
            raise ConfigError(
                f"{setting}: {name} has shape {list(tensor.shape)}, but config.json says "
                f"{list(shape)}"
            )
        if tensor.dtype is None:
            raise ConfigError(
                f"{setting}: {name} has type {tensor.type_name}: "
                "convert the bf16, fp16 or fp32 original of the model"
            )


def _check_names(
    weights: SafetensorsFolder, expected: Mapping[str, tuple[int, ...]], *, tied: bool, setting: str
) -> None:
    extra = [
        name
        for name in weights.tensors
        if name not in expected and not name.endswith(IGNORED_SUFFIXES)
    ]
    missing = [name for name in expected if name not in weights.tensors]
    if missing:
        raise ConfigError(
            f"{setting}: {_summarize(missing)} missing in {weights.folder}: "
            "config.json describes another model, or files are missing"
        )
    if tied and "lm_head.weight" in extra:
        _check_tied(weights, setting)
        extra.remove("lm_head.weight")
    if extra:
        raise ConfigError(
            f"{setting}: {weights.folder} holds {_summarize(extra)}, "
            "which a model of its config.json does not have"
        )


def _check_tied(weights: SafetensorsFolder, setting: str) -> None:
    if not torch.equal(weights.read("lm_head.weight"), weights.read("model.embed_tokens.weight")):
        raise ConfigError(
            f"{setting}: config.json says tie_word_embeddings, "
            "but lm_head.weight differs from model.embed_tokens.weight"
        )


def _summarize(names: list[str]) -> str:
    return f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"


def write_checkpoint(
    output: Path,
    source: HuggingFaceSource,
    *,
    tokenizer: str | None,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write `output`/checkpoints/step-00000000 from a Hugging Face folder.

    Args:
        output: new run directory; must not exist.
        source: the checked Hugging Face folder.
        tokenizer: digest of the vocabulary, or None.
        files: further files of `output`, name -> content.

    Returns:
        The step folder.
    """
    slices = [
        tensor_slice
        for mapping, layer in tensor_mappings(source.model)
        for tensor_slice in _tensor_slices(source, mapping, layer)
    ]
    return commit_checkpoint(
        output, source.model, slices, precision=source.precision, tokenizer=tokenizer, files=files
    )


@dataclass(frozen=True)
class _Target:
    """Describe one tensor of the checkpoint; `layer` is None outside the stacked layers."""

    name: str
    layer: int | None
    num_layers: int
    dtype: torch.dtype

    def slice_rows(
        self, shape: tuple[int, ...], start: int, count: int, load: Callable[[], Tensor]
    ) -> TensorSlice:
        """Return the slice of rows [start, start + count) of one layer's tensor of `shape`."""
        full_shape, part = shape, (count, *shape[1:])
        offset = (start, *[0] * (len(shape) - 1))
        if self.layer is not None:
            full_shape, part = (self.num_layers, *full_shape), (1, *part)
            offset = (self.layer, *offset)
        return TensorSlice(
            self.name, full_shape, offset, part, self.dtype, lambda: load().view(part)
        )


def _tensor_slices(
    source: HuggingFaceSource, mapping: TensorMapping, layer: int | None
) -> Iterator[TensorSlice]:
    """Yield a checkpoint tensor in slices that each need one Hugging Face tensor (qkv: three)."""
    model, names = source.model, huggingface_names(mapping, layer)
    read = source.weights.read
    target = _Target(mapping.megatron_name, layer, model.num_layers, PRECISIONS[source.precision])
    shapes = [source.weights.tensors[name].shape for name in names]
    if mapping.kind == "vocabulary":
        padded = padded_vocab_size(source.vocab_size, model.vocab_size_multiple)
        shape: tuple[int, ...] = (padded, model.hidden_size)
        yield target.slice_rows(
            shape, 0, padded, lambda: pad_vocabulary(read(names[0]), source.vocab_size, padded)
        )
    elif mapping.kind == "gate_up":
        width = model.ffn_hidden_size
        for number, name in enumerate(names):
            shape = (2 * width, model.hidden_size)
            yield target.slice_rows(shape, number * width, width, partial(read, name))
    elif mapping.kind == "qkv":
        shape = (sum(part[0] for part in shapes), *shapes[0][1:])
        yield target.slice_rows(
            shape, 0, shape[0], lambda: merge_qkv([read(name) for name in names], model)
        )
    else:
        yield target.slice_rows(shapes[0], 0, shapes[0][0], partial(read, names[0]))
