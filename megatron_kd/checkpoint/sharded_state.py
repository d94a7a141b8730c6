"""Save and load weights and optimizer state through megatron-core's dist_checkpointing.

A state that was saved in one parallel layout loads in any.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.models.gpt.gpt_model import GPTModel
from torch.distributed.checkpoint.api import CheckpointException

from megatron_kd.checkpoint.loader import CommonLoadStrategy, ShardedLoadStrategy
from megatron_kd.checkpoint.manifest import STALE_SECONDS, verify
from megatron_kd.checkpoint.store import CheckpointInfo, damage_message, has_digests, read_info
from megatron_kd.checkpoint.tensors import read_metadata
from megatron_kd.config import ConfigError
from megatron_kd.models.projections import PROJECTIONS
from megatron_kd.parallel.collectives import from_all_ranks, raise_together


def _metadata() -> dict[str, Any]:
    """Return the layout-independent form of the distributed optimizer's state.

    The plain optimizer has no other. A new dict for each call, because megatron-core writes the
    process group of its first use into it.
    """
    return {"distrib_optim_sharding_type": "fully_reshardable"}


_EXTRA = "_extra_state"


def _is_weight(name: str) -> bool:
    """Return True for the model's own weights among the entries of its state."""
    return not name.endswith(_EXTRA) and not name.startswith(PROJECTIONS)


class OptimizerState(Protocol):
    """Provide the parts of an optimizer that a checkpoint needs."""

    inner: Any

    def loading(self) -> AbstractContextManager[None]:
        """Return a context to be entered while saved state is read and loaded."""
        ...


def training_state(models: Sequence[GPTModel], optimizer: OptimizerState) -> dict[str, Any]:
    """Return the content of a checkpoint as megatron-core's sharded state.

    Collectives:
        Over the data-parallel groups.
    """
    state = _model_state(models)
    state["optimizer"] = optimizer.inner.sharded_state_dict(state, metadata=_metadata())
    return state


def find_damage(folder: Path, info: CheckpointInfo) -> list[str]:
    """Return what is wrong with a checkpoint's files, a sentence each, equal on every rank.

    Every rank reads its share. The result is empty where the checkpoint has no digests.

    Collectives:
        Over the world: one gather of objects.
    """
    share = dist.get_rank(), dist.get_world_size()
    problems = (
        verify(folder, share=share, patience=STALE_SECONDS) if has_digests(folder, info) else []
    )
    return list(
        dict.fromkeys(
            problem for rank_problems in from_all_ranks(problems) for problem in rank_problems
        )
    )


def check_together(folder: Path, info: CheckpointInfo, *, setting: str) -> None:
    """Raise ConfigError on every rank where a file of the checkpoint is damaged.

    Collectives:
        Over the world.
    """
    problems = find_damage(folder, info)
    if problems:
        raise ConfigError(f"{setting}: {damage_message(problems)}")


def load_weights(folder: Path, models: Sequence[GPTModel], *, setting: str) -> None:
    """Fill the models' parameters from a checkpoint of any layout, after verifying its files.

    Projections to a teacher's layers keep their values, whether the checkpoint holds some or not:
    they belong to a run.

    Args:
        folder: the step folder.
        models: this rank's model chunks.
        setting: the run-file key that an error names.

    Raises:
        ConfigError: the checkpoint is damaged or does not fit.

    Collectives:
        Over the world.
    """
    check_together(folder, read_info(folder, setting=setting), setting=setting)
    state = _without_extra(_model_state(models))
    for model in state.values():
        for name in [name for name in model if not _is_weight(name)]:
            del model[name]
    _fill_models(models, _load(state, folder, setting), folder, setting, needed=_is_weight)


def load_training_state(
    folder: Path, models: Sequence[GPTModel], optimizer: OptimizerState, *, setting: str
) -> None:
    """Fill parameters and optimizer state from a checkpoint of any layout, verified before.

    Args:
        folder: the step folder.
        models: this rank's model chunks.
        optimizer: their optimizer.
        setting: the run-file key that an error names.

    Raises:
        ConfigError: the checkpoint does not fit.

    Collectives:
        Over the world.
    """
    state = _model_state(models)
    with optimizer.loading():
        state["optimizer"] = optimizer.inner.sharded_state_dict(
            state, is_loading=True, metadata=_metadata()
        )
        loaded = _load(_without_extra(state), folder, setting)
        _fill_models(models, loaded, folder, setting, needed=lambda name: not name.endswith(_EXTRA))
        optimizer.inner.load_state_dict(loaded["optimizer"])


def _model_state(models: Sequence[GPTModel]) -> dict[str, Any]:
    return {
        f"model{index}": model.sharded_state_dict(
            metadata={**_metadata(), "dp_cp_group": model.pg_collection.dp_cp}
        )
        for index, model in enumerate(models)
    }


def _without_extra(state: dict[str, Any]) -> dict[str, Any]:
    """Remove the entries that layers store beside their weights from the state; return it.

    They have no content here, differ between Transformer Engine's layers and the local ones, and
    are pickles that Transformer Engine would run.
    """
    for model in [content for name, content in state.items() if name.startswith("model")]:
        for name in [name for name in model if name.endswith(_EXTRA)]:
            del model[name]
    return state


def _fill_models(
    models: Sequence[GPTModel], loaded: dict[str, Any], folder: Path, setting: str, *, needed: Any
) -> None:
    for index, model in enumerate(models):
        missing, unexpected = model.load_state_dict(loaded[f"model{index}"], strict=False)
        problems = [*filter(needed, missing), *unexpected]
        if problems:
            raise ConfigError(
                f"{setting}: checkpoint {folder} does not fit the model: {problems[0]} is in only "
                "one of them"
            )


def _load(state: dict[str, Any], folder: Path, setting: str) -> dict[str, Any]:
    problem = None
    try:
        read_metadata(folder, setting=setting)
    except ConfigError as error:
        problem = str(error)
    raise_together(problem, ConfigError)
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(
            state, str(folder), ShardedLoadStrategy(setting=setting), CommonLoadStrategy()
        )
    except (
        CheckpointingException,
        CheckpointException,
        OSError,
        KeyError,
        RuntimeError,
        ValueError,
        TypeError,
        pickle.PickleError,
    ) as error:
        if isinstance(error, ConfigError):
            raise
        lines = str(error).strip().splitlines() or [""]
        raise ConfigError(
            f"{setting}: checkpoint {folder} cannot be loaded ({type(error).__name__}: "
            f"{lines[0][:200]})"
        ) from error
    return loaded
