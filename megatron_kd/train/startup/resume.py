"""Choose the checkpoint that a run resumes from: the newest intact one, the same on every rank."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_kd.checkpoint.manifest import STALE_SECONDS, summarize_problems, wait_for_folder
from megatron_kd.checkpoint.saver import Saver
from megatron_kd.checkpoint.sharded_state import find_damage
from megatron_kd.checkpoint.store import (
    CheckpointInfo,
    complete_steps,
    has_digests,
    quarantine,
    read_info,
    step_folder,
)
from megatron_kd.config import ConfigError, RunConfig
from megatron_kd.parallel.collectives import from_rank_zero, raise_together
from megatron_kd.train.startup.input_checks import Inputs, check_resume, checkpoints_folder
from megatron_kd.train.startup.run_fingerprint import (
    MAY_CHANGE_ON_RESUME,
    checkpoint_settings,
    differences,
)


def choose_checkpoint(config: RunConfig, inputs: Inputs) -> Inputs:
    """Return `inputs` with the newest intact checkpoint to resume and the damaged newer ones.

    Rank 0 lists the checkpoints, because a rank may see an old list on a network file system. Every
    rank reads its share of each candidate. Collective over the world.

    Raises:
        ConfigError: On every rank: no checkpoint is intact, or ranks see different folders.
    """
    checkpoints = checkpoints_folder(config)
    damaged: list[tuple[int, str]] = []
    for step in reversed(from_rank_zero(lambda: complete_steps(checkpoints))):
        folder = step_folder(checkpoints, step)
        _check_visible(folder)
        info, problems = _inspect(folder)
        if info is None or problems:
            damaged.append((step, summarize_problems(problems)))
            continue
        _check_resume(config, inputs, folder, info)
        _report_choice(folder, info, damaged)
        return replace(inputs, resume=(folder, info), skipped_checkpoints=tuple(damaged))
    if damaged:
        raise ConfigError(_all_damaged(damaged))
    if inputs.resume is not None:
        raise ConfigError(_not_shared(inputs.resume[0]))
    return inputs


def attach_settings(config: RunConfig, inputs: Inputs) -> Inputs:
    """Return `inputs` with the settings that decide the weights, and how they have changed.

    Rank 0 reads data and teacher. Collective over the world: one broadcast.

    Raises:
        ConfigError: On every rank: the run was trained with other settings and
            checkpoint.allow_changes is false.
    """
    settings = from_rank_zero(lambda: checkpoint_settings(config, inputs))
    stored = inputs.resume[1].settings if inputs.resume is not None else {}
    # Checkpoints of the first versions store no settings.
    changes = differences(stored, settings, ignored=MAY_CHANGE_ON_RESUME) if stored else []
    if changes and not config.checkpoint.allow_changes:
        raise ConfigError(
            f"run.directory: {config.run.directory} was trained with other settings "
            f"({'; '.join(changes)}): restore them, choose another run.directory, or set "
            "checkpoint.allow_changes = true to continue with the new ones"
        )
    return replace(inputs, settings=settings, changed_settings=tuple(changes))


def reconcile_checkpoints(inputs: Inputs, saver: Saver) -> None:
    """Log changed settings, rename damaged checkpoints and remove old ones.

    Call it on rank 0, with the lock of the run directory.
    """
    saver.clean()
    if inputs.changed_settings and inputs.resume is not None:
        changes = "; ".join(inputs.changed_settings)
        saver.log.warn(
            "settings", inputs.resume[1].step, f"continuing with other settings: {changes}"
        )
    for step, problem in inputs.skipped_checkpoints:
        _quarantine(saver, step, problem)
    if inputs.resume is not None and has_digests(*inputs.resume):
        # The last rotation may have been interrupted. Repeat it now that the damaged checkpoints,
        # which do not count as kept ones, have other names.
        saver.verifier.add(inputs.resume[1].step, verified=True)


def _check_visible(folder: Path) -> None:
    wait_for_folder(folder, STALE_SECONDS)
    raise_together(None if folder.is_dir() else _not_shared(folder), ConfigError)


def _inspect(folder: Path) -> tuple[CheckpointInfo | None, list[str]]:
    """Return the description of a checkpoint and its problems, the same on every rank."""

    def read() -> tuple[CheckpointInfo | None, list[str]]:
        try:
            return read_info(folder, setting="run.directory"), []
        except ConfigError as error:
            return None, [str(error).removeprefix("run.directory: ")]

    info, problems = from_rank_zero(read)
    return info, problems or find_damage(folder, info) if info is not None else problems


def _check_resume(config: RunConfig, inputs: Inputs, folder: Path, info: CheckpointInfo) -> None:
    problem = None
    try:
        check_resume(
            config,
            folder,
            info,
            vocab_size=inputs.vocab_size,
            digest=inputs.digest,
            projections=inputs.projections,
        )
    except ConfigError as error:
        problem = str(error)
    raise_together(problem, ConfigError)


def _report_choice(folder: Path, info: CheckpointInfo, damaged: list[tuple[int, str]]) -> None:
    if not has_digests(folder, info):
        _warn(
            f"{folder} was written by an earlier version, without digests: damage to its files "
            "cannot be detected"
        )
    for step, problem in damaged:
        _warn(f"the checkpoint of step {step} is damaged and skipped: {problem}")
    if damaged:
        _warn(f"resuming from the checkpoint of step {info.step}, the newest intact one")


def _all_damaged(damaged: Iterable[tuple[int, str]]) -> str:
    problems = "; ".join(f"step {step}: {problem}" for step, problem in damaged)
    return (
        f"run.directory: no checkpoint is intact ({problems}): restore one from a copy, or start "
        "again in another run.directory"
    )


def _not_shared(folder: Path) -> str:
    return (
        f"run.directory: {folder} is visible to some ranks only: is run.directory shared by all "
        "machines?"
    )


def _quarantine(saver: Saver, step: int, problem: str) -> None:
    """Give a damaged checkpoint a name that no search for checkpoints matches."""
    folder = step_folder(saver.checkpoints, step)
    try:
        renamed = quarantine(folder)
    except OSError as error:
        message = f"{folder} is damaged and cannot be renamed ({error.strerror}): {problem}"
    else:
        message = (
            f"the damaged checkpoint of step {step} is now {renamed}: remove it after inspection"
        )
    saver.log.warn("damaged", step, message)


def _warn(message: str) -> None:
    if dist.get_rank() == 0:
        print(f"megatron_kd: warning: {message}", file=sys.stderr, flush=True)
