"""Weights and optimizer state through megatron-core's dist_checkpointing: saved in one layout, loaded in any."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_kd.checkpoint.store import CheckpointInfo, PendingCheckpoint, prune
from megatron_kd.checkpoint.tensors import read_metadata
from megatron_kd.checkpoint.writer import InProcessSave
from megatron_kd.config import ConfigError


def _metadata() -> dict[str, Any]:
    """One layout-independent form of the distributed optimizer's state; the plain optimizer has no other.

    Made anew for each call: megatron-core writes the process group of its first use into it.
    """
    return {"distrib_optim_sharding_type": "fully_reshardable"}


_EXTRA = "_extra_state"


class OptimizerState(Protocol):
    """What of an optimizer a checkpoint needs."""

    inner: Any

    def loading(self) -> AbstractContextManager[None]:
        """Entered while saved state is read and loaded."""
        ...


def save_checkpoint(
    checkpoints: Path, info: CheckpointInfo, models: Sequence[GPTModel], optimizer: OptimizerState, *, keep_last: int
) -> Path:
    """Write one checkpoint and drop old ones. Collective over the world; every rank returns once it is committed."""
    pending = PendingCheckpoint(checkpoints, info.step)
    first = dist.get_rank() == 0
    if first:
        pending.start()
    dist.barrier()
    state = _model_state(models)
    state["optimizer"] = optimizer.inner.sharded_state_dict(state, metadata=_metadata())
    dist_checkpointing.save(state, str(pending.folder), InProcessSave())
    dist.barrier()
    if first:
        pending.commit(info)
        prune(checkpoints, keep_last)
    dist.barrier()
    return pending.final


def load_weights(folder: Path, models: Sequence[GPTModel], *, what: str) -> None:
    """Fill the models' parameters from a checkpoint saved in any layout. Collective over the world.

    Only tensors are read: the entries without content that layers store beside their weights are pickles, and differ between
    Transformer Engine's layers and the local ones.
    """
    read_metadata(folder, what=what)  # refuses a table of contents that would run code before megatron-core opens it
    state = _model_state(models)
    for model in state.values():
        for name in [name for name in model if name.endswith(_EXTRA)]:
            del model[name]
    loaded = _load(state, folder, what)
    for index, model in enumerate(models):
        missing, unexpected = model.load_state_dict(loaded[f"model{index}"], strict=False)
        problems = [*(name for name in missing if not name.endswith(_EXTRA)), *unexpected]
        if problems:
            raise ConfigError(f"{what}: checkpoint {folder} does not fit the model: {problems[0]} is on one side only")


def load_training_state(folder: Path, models: Sequence[GPTModel], optimizer: OptimizerState, *, what: str) -> None:
    """Fill parameters and optimizer state from a checkpoint saved in any layout. Collective over the world."""
    state = _model_state(models)
    with optimizer.loading():
        state["optimizer"] = optimizer.inner.sharded_state_dict(state, is_loading=True, metadata=_metadata())
        loaded = _load(state, folder, what)
        _into_models(models, loaded)
        optimizer.inner.load_state_dict(loaded["optimizer"])


def _model_state(models: Sequence[GPTModel]) -> dict[str, Any]:
    return {
        f"model{index}": model.sharded_state_dict(metadata={**_metadata(), "dp_cp_group": model.pg_collection.dp_cp})
        for index, model in enumerate(models)
    }


def _into_models(models: Sequence[GPTModel], loaded: dict[str, Any]) -> None:
    for index, model in enumerate(models):
        model.load_state_dict(loaded[f"model{index}"])


def _load(state: dict[str, Any], folder: Path, what: str) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(folder))
    except (CheckpointingException, OSError, KeyError, RuntimeError) as error:
        raise ConfigError(
            f"{what}: checkpoint {folder} cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
        ) from error
    return loaded
