"""Weights from a Hugging Face folder or another megatron-core checkpoint into a checkpoint of ours, and out again.

Everything passes tensor by tensor; nothing here builds a model. The result appears under its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_kd import __version__
from megatron_kd.checkpoint.store import CheckpointInfo, PendingCheckpoint, check_digests
from megatron_kd.checkpoint.tensors import Piece, TensorReader, write_pieces
from megatron_kd.config import ConfigError, ModelSection
from megatron_kd.models.huggingface.families import (
    EXTRA_STATES,
    IGNORED_SUFFIXES,
    Row,
    config_from_model,
    head_dim,
    model_from_config,
    rows_of,
    their_names,
    their_shapes,
)
from megatron_kd.models.huggingface.safetensors import SafetensorsFolder, write_safetensors
from megatron_kd.parallel.vocab_shards import padded_vocab_size
from megatron_kd.storage.atomic_files import sync_path
from megatron_kd.storage.json_files import read_json

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_HF_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class Source:
    """A Hugging Face folder that has been checked: every tensor the model needs is there, in its shape, and nothing else."""

    weights: SafetensorsFolder
    model: ModelSection
    config: Mapping[str, Any]
    precision: str

    @property
    def vocab_size(self) -> int:
        """True number of ids."""
        assert self.model.vocab_size is not None
        return self.model.vocab_size


def open_huggingface(
    folder: Path,
    *,
    vocab_size: int | None = None,
    vocab_size_multiple: int = 128,
    precision: str | None = None,
    what: str = "input",
) -> Source:
    """Read config.json and the tables of the safetensors files, and hold them against each other. ConfigError naming `what`.

    vocab_size: keep only this many ids (the folder's further rows are padding that no tokenizer id uses); None: all rows.
    precision: type of the checkpoint; None: bf16 where all weights are, else fp32.
    """
    weights = SafetensorsFolder(folder, what=what)
    config = read_json(folder / "config.json", what=what)
    model = model_from_config(config, what=what)
    theirs = model.vocab_size
    assert theirs is not None
    if vocab_size is not None and not 1 < vocab_size <= theirs:
        raise ConfigError(
            f"{what}: the vocabulary size asked for ({vocab_size}) must be in [2, {theirs}], the rows of the embedding"
        )
    _check_tensors(weights, model, theirs, what)
    model = model.model_copy(
        update={"vocab_size": vocab_size or theirs, "vocab_size_multiple": vocab_size_multiple}
    )
    if precision is None:
        types = {
            weights.tensors[name].dtype
            for row, layer in rows_of(model)
            for name in their_names(row, layer)
        }
        precision = "bf16" if types == {torch.bfloat16} else "fp32"
    return Source(weights, model, config, precision)


def _check_tensors(
    weights: SafetensorsFolder, model: ModelSection, vocab_size: int, what: str
) -> None:
    if model.num_layers > len(weights.tensors):
        # Before anything is made for each layer: the number may be anything.
        raise ConfigError(
            f"{what}: config.json says {model.num_layers} layers, but {weights.folder} holds only {len(weights.tensors)} tensors: they are "
            "not of one model, or files are missing"
        )
    wanted = {
        name: shape
        for row, layer in rows_of(model)
        for name, shape in zip(
            their_names(row, layer), their_shapes(row, model, vocab_size), strict=True
        )
    }
    extra = [
        name
        for name in weights.tensors
        if name not in wanted and not name.endswith(IGNORED_SUFFIXES)
    ]
    missing = [name for name in wanted if name not in weights.tensors]
    if missing:
        raise ConfigError(
            f"{what}: {_some(missing)} missing in {weights.folder}: config.json describes another model, or files are missing"
        )
    if model.tied_embeddings and "lm_head.weight" in extra:
        _check_tied(weights, what)
        extra.remove("lm_head.weight")
    if extra:
        raise ConfigError(
            f"{what}: {weights.folder} holds {_some(extra)}, which a model of its config.json does not have"
        )
    for name, shape in wanted.items():
        found = weights.tensors[name]
        if found.shape != shape:
            raise ConfigError(
                f"{what}: {name} has shape {list(found.shape)}, but config.json says {list(shape)}"
            )
        if found.dtype is None:
            raise ConfigError(
                f"{what}: {name} has type {found.type_name}: convert the bf16, fp16 or fp32 original of the model"
            )


def _check_tied(weights: SafetensorsFolder, what: str) -> None:
    if not torch.equal(weights.read("lm_head.weight"), weights.read("model.embed_tokens.weight")):
        raise ConfigError(
            f"{what}: config.json says tie_word_embeddings, but lm_head.weight differs from model.embed_tokens.weight"
        )


def _some(names: list[str]) -> str:
    return f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"


def write_checkpoint(
    output: Path, source: Source, *, tokenizer: str | None, files: Mapping[str, bytes] | None = None
) -> Path:
    """Write `output`/checkpoints/step-00000000 from a Hugging Face folder; returns it. `output` must not exist.

    tokenizer: digest of its vocabulary. files: what else goes into `output`, name -> content.
    """
    pieces = [
        piece for row, layer in rows_of(source.model) for piece in _pieces(source, row, layer)
    ]
    return _commit(
        output, source.model, pieces, precision=source.precision, tokenizer=tokenizer, files=files
    )


def _commit(
    output: Path,
    model: ModelSection,
    pieces: list[Piece],
    *,
    precision: str,
    tokenizer: str | None,
    files: Mapping[str, bytes] | None,
) -> Path:
    if output.exists():
        raise ConfigError(f"output {output} exists already: choose another name")
    assert model.vocab_size is not None
    info = CheckpointInfo(
        step=0,
        consumed_samples=0,
        consumed_tokens=0,
        nonfinite_steps=0,
        model=model.model_dump(mode="json"),
        vocab_size=model.vocab_size,
        tokenizer=tokenizer,
        precision=precision,
        distributed_optimizer=None,
        version=__version__,
    )
    layers = model.num_layers
    objects = [
        f"{name}._extra_state/shard_{layer}_{layers}"
        for name in EXTRA_STATES
        for layer in range(layers)
    ]
    with _appearing(output) as hidden:
        pending = PendingCheckpoint(hidden / "checkpoints", 0)
        pending.start()
        written = write_pieces(pending.folder, pieces, objects=objects)
        pending.commit(info, written)
        _write_files(hidden, files)
    return output / pending.final.relative_to(hidden)


@contextlib.contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """A hidden folder that becomes `output` once it is complete; a failure leaves neither. What a killed one left is removed."""
    hidden = output.with_name(f".incomplete-{output.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    try:
        yield hidden
        for path in [*hidden.iterdir(), hidden]:
            sync_path(path)
        os.replace(hidden, output)
        sync_path(output.parent)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise


def _write_files(folder: Path, files: Mapping[str, bytes] | None) -> None:
    for name, content in (files or {}).items():
        (folder / name).write_bytes(content)


def _pieces(source: Source, row: Row, layer: int | None) -> Iterator[Piece]:
    """What is written for one tensor of ours, as slices that need one tensor of theirs each (three for "qkv")."""
    model, names = source.model, their_names(row, layer)
    dtype = _PRECISIONS[source.precision]
    parts = [source.weights.tensors[name].shape for name in names]

    def piece(shape: tuple[int, ...], start: int, rows: int, load: Any) -> Piece:
        whole, part, offset = shape, (rows, *shape[1:]), (start, *[0] * (len(shape) - 1))
        if layer is not None:
            whole, part, offset = (model.num_layers, *whole), (1, *part), (layer, *offset)
        return Piece(row.ours, whole, offset, part, dtype, lambda: load().view(part))

    if row.kind == "vocabulary":
        padded = padded_vocab_size(source.vocab_size, model.vocab_size_multiple)
        yield piece(
            (padded, model.hidden_size),
            0,
            padded,
            lambda: _pad(source.weights.read(names[0]), source.vocab_size, padded),
        )
    elif row.kind == "gate_up":
        rows = model.ffn_hidden_size
        for number, name in enumerate(names):
            yield piece(
                (2 * rows, model.hidden_size),
                number * rows,
                rows,
                lambda name=name: source.weights.read(name),
            )
    elif row.kind == "qkv":
        shape = (sum(part[0] for part in parts), *parts[0][1:])
        yield piece(
            shape,
            0,
            shape[0],
            lambda: merge_qkv([source.weights.read(name) for name in names], model),
        )
    else:
        yield piece(parts[0], 0, parts[0][0], lambda: source.weights.read(names[0]))


def _pad(rows: Tensor, vocab_size: int, padded: int) -> Tensor:
    """[V, H] -> [padded, H]; rows past `vocab_size` are zero."""
    out = rows.new_zeros(padded, rows.shape[1])
    out[:vocab_size] = rows[:vocab_size]
    return out


def merge_qkv(parts: list[Tensor], model: ModelSection) -> Tensor:
    """q [heads * d, ...], k and v [groups * d, ...] -> [(heads + 2 * groups) * d, ...]: per group its queries, its key, its value."""
    groups = model.num_query_groups or model.num_attention_heads
    q, k, v = (part.view(groups, -1, head_dim(model), *part.shape[1:]) for part in parts)
    return torch.cat([q, k, v], dim=1).flatten(0, 2)


def split_qkv(merged: Tensor, model: ModelSection) -> list[Tensor]:
    """The other way round."""
    groups, heads = model.num_query_groups or model.num_attention_heads, model.num_attention_heads
    grouped = merged.view(groups, heads // groups + 2, head_dim(model), *merged.shape[1:])
    return [part.flatten(0, 2) for part in grouped.split([heads // groups, 1, 1], dim=1)]


class OurWeights:
    """Whole tensors of a checkpoint of megatron-core, by our names and layer.

    Layers may be stacked in one tensor ("decoder.layers.mlp...", as here) or stored one by one ("decoder.layers.3.mlp...").
    """

    def __init__(self, folder: Path, model: ModelSection, vocab_size: int, *, what: str) -> None:
        self.model, self.vocab_size, self._what = model, vocab_size, what
        self.reader = TensorReader(folder, what=what)
        for row, layer in rows_of(model):
            self._check(row, layer)

    def read(self, row: Row, layer: int | None) -> Tensor:
        """One tensor of ours without the padding of the vocabulary."""
        name, stacked = self._name(row, layer)
        shape = self._shape(row)
        if layer is not None and stacked:
            return self.reader.read(name, (layer, *[0] * len(shape)), (1, *shape)).view(shape)
        return self.reader.read(name, [0] * len(shape), shape)

    def dtypes(self) -> set[torch.dtype]:
        """Types of the model's tensors."""
        return {
            self.reader.tensors[self._name(row, layer)[0]].dtype
            for row, layer in rows_of(self.model)
        }

    def _shape(self, row: Row) -> tuple[int, ...]:
        parts = their_shapes(row, self.model, self.vocab_size)
        return (sum(part[0] for part in parts), *parts[0][1:])

    def _name(self, row: Row, layer: int | None) -> tuple[str, bool]:
        single = row.ours.replace("decoder.layers.", f"decoder.layers.{layer}.")
        return (
            (single, False)
            if layer is not None and single in self.reader.tensors
            else (row.ours, True)
        )

    def _check(self, row: Row, layer: int | None) -> None:
        name, stacked = self._name(row, layer)
        found = self.reader.tensors.get(name)
        if found is None:
            raise ConfigError(
                f"{self._what}: {self.reader.folder} lacks {name}: the checkpoint is not of this model"
            )
        shape = self._shape(row)
        wanted = (self.model.num_layers, *shape) if layer is not None and stacked else shape
        enough = (
            found.shape[1:] == wanted[1:] and found.shape[0] >= wanted[0]
            if row.kind == "vocabulary"
            else found.shape == wanted
        )
        if not enough:
            raise ConfigError(
                f"{self._what}: {name} has shape {list(found.shape)}, but the model says {list(wanted)}"
            )


def adopt_checkpoint(
    folder: Path,
    model: ModelSection,
    output: Path,
    *,
    tokenizer: str | None,
    files: Mapping[str, bytes] | None = None,
    what: str = "input",
) -> Path:
    """Bring a megatron-core checkpoint written by another program under our roof: weights only, checked, padded as here.

    See write_checkpoint for the rest.
    """
    assert model.vocab_size is not None
    weights = OurWeights(folder, model, model.vocab_size, what=what)
    precision = "bf16" if weights.dtypes() == {torch.bfloat16} else "fp32"
    dtype = _PRECISIONS[precision]
    padded = padded_vocab_size(model.vocab_size, model.vocab_size_multiple)

    def piece(row: Row, layer: int | None) -> Piece:
        shape = weights._shape(row)
        if row.kind == "vocabulary":
            return Piece(
                row.ours,
                (padded, shape[1]),
                (0, 0),
                (padded, shape[1]),
                dtype,
                lambda: _pad(weights.read(row, None), shape[0], padded),
            )
        if layer is None:
            return Piece(
                row.ours, shape, (0,) * len(shape), shape, dtype, lambda: weights.read(row, None)
            )
        whole, offset = (model.num_layers, *shape), (layer, *[0] * len(shape))
        return Piece(
            row.ours, whole, offset, (1, *shape), dtype, lambda: weights.read(row, layer)[None]
        )

    pieces = [piece(*place) for place in rows_of(model)]
    return _commit(output, model, pieces, precision=precision, tokenizer=tokenizer, files=files)


def write_huggingface(
    output: Path,
    folder: Path,
    info: CheckpointInfo,
    *,
    max_positions: int,
    special_ids: Mapping[str, int] | None = None,
    shard_bytes: int = 2 * 10**9,
    files: Mapping[str, bytes] | None = None,
    what: str = "input",
) -> dict[str, Any]:
    """Write a checkpoint of ours as a Hugging Face folder `output`, which must not exist; returns its config.json.

    files: what else goes into the folder (the tokenizer's), name -> content.
    """
    if output.exists():
        raise ConfigError(f"output {output} exists already: choose another name")
    check_digests(folder, info, what=what)
    model = info.model_section()
    weights = OurWeights(folder, model, info.vocab_size, what=what)
    (dtype, *others) = weights.dtypes()
    if others:
        dtype = torch.float32
    config = config_from_model(
        model,
        vocab_size=info.vocab_size,
        dtype=_HF_DTYPES[dtype],
        max_positions=max_positions,
        special_ids=special_ids,
    )
    with _appearing(output) as hidden:
        write_safetensors(hidden, _their_tensors(weights, dtype), shard_bytes=shard_bytes)
        _write_files(
            hidden, {"config.json": (json.dumps(config, indent=2) + "\n").encode(), **(files or {})}
        )
    return config


def _their_tensors(weights: OurWeights, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    model = weights.model
    for row, layer in rows_of(model):
        ours = weights.read(row, layer).to(dtype)
        parts = split_qkv(ours, model) if row.kind == "qkv" else ours.chunk(len(row.theirs))
        yield from zip(their_names(row, layer), parts, strict=True)
