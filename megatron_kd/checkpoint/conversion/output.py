"""Write converted weights to a folder that appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_kd import __version__
from megatron_kd.checkpoint.store import CheckpointInfo, PendingCheckpoint
from megatron_kd.checkpoint.tensors import TensorSlice, write_slices
from megatron_kd.config import ConfigError, ModelSection
from megatron_kd.models.huggingface.tensor_names import EXTRA_STATES
from megatron_kd.storage.atomic_files import sync_path

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def commit_checkpoint(
    output: Path,
    model: ModelSection,
    slices: list[TensorSlice],
    *,
    precision: str,
    tokenizer: str | None,
    files: Mapping[str, bytes] | None,
) -> Path:
    """Write a checkpoint of step 0 that holds weights alone.

    Args:
        output: new run directory; must not exist.
        model: the model that the weights belong to, with its vocabulary size.
        slices: all tensors, in slices that are loaded one at a time.
        precision: key of PRECISIONS.
        tokenizer: digest of the vocabulary, or None.
        files: further files of `output`, name -> content.

    Returns:
        The step folder, `output`/checkpoints/step-00000000.

    Raises:
        ConfigError: `output` exists.
    """
    check_is_new(output)
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
    with atomic_folder(output) as folder:
        pending = PendingCheckpoint(folder / "checkpoints", 0)
        pending.start()
        records = write_slices(pending.folder, slices, objects=objects)
        pending.commit(info, records)
        write_files(folder, files)
    return output / pending.final.relative_to(folder)


def check_is_new(output: Path) -> None:
    """Raise ConfigError where `output` exists."""
    if output.exists():
        raise ConfigError(f"output {output} exists already: choose another name")


@contextlib.contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """Yield a hidden folder that becomes `output` once the block ends without an error.

    A failure leaves neither folder. The hidden folder of a killed process is removed first.
    """
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


def write_files(folder: Path, files: Mapping[str, bytes] | None) -> None:
    """Write `files`, name -> content, into `folder`."""
    for name, content in (files or {}).items():
        (folder / name).write_bytes(content)


def pad_vocabulary(weight: Tensor, vocab_size: int, padded_size: int) -> Tensor:
    """Return a weight [V, H] as [padded_size, H], with zeros from row `vocab_size` on."""
    padded = weight.new_zeros(padded_size, weight.shape[1])
    padded[:vocab_size] = weight[:vocab_size]
    return padded
