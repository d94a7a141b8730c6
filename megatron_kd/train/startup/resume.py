"""Which checkpoint a run goes on from: the newest one whose files are what was written, the same on every rank."""

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
from megatron_kd.train.startup.run_fingerprint import differences, settings_of


def choose_checkpoint(config: RunConfig, inputs: Inputs) -> Inputs:
    """`inputs` with the newest sound checkpoint of the run to resume, and the damaged ones that were passed over for it.

    Rank 0 says which there are: on network file systems a rank may see an old list. Every rank reads its share of each candidate.
    Collective over the world. ConfigError on every rank where there are checkpoints and none is sound, or ranks see different folders.
    """
    checkpoints = checkpoints_folder(config)
    damaged: list[tuple[int, str]] = []
    for step in reversed(from_rank_zero(lambda: complete_steps(checkpoints))):
        folder = step_folder(checkpoints, step)
        _see_together(folder)
        info, problems = _look(folder)
        if info is None or problems:
            damaged.append((step, summarize_problems(problems)))
            continue
        _check_together(config, inputs, folder, info)
        if not has_digests(folder, info):
            _warn(
                f"{folder} was written without digests by an earlier version: nothing is known about damage to its files"
            )
        for bad, problem in damaged:
            _warn(f"the checkpoint of step {bad} is damaged and passed over: {problem}")
        if damaged:
            _warn(f"going on from the checkpoint of step {step}, the newest that is sound")
        return replace(inputs, resume=(folder, info), passed_over=tuple(damaged))
    if damaged:
        raise ConfigError(_none_left(damaged))
    if inputs.resume is not None:
        raise ConfigError(
            f"run.directory: {inputs.resume[0]} is seen by some ranks only: is run.directory shared by all machines?"
        )
    return inputs


def _none_left(damaged: Iterable[tuple[int, str]]) -> str:
    found = "; ".join(f"step {step}: {problem}" for step, problem in damaged)
    return f"run.directory: no checkpoint is sound ({found}): restore one from a copy, or start over in another run.directory"


def _see_together(folder: Path) -> None:
    wait_for_folder(folder, STALE_SECONDS)
    here = folder.is_dir()
    raise_together(
        None
        if here
        else f"run.directory: {folder} is seen by some ranks only: is run.directory shared by all machines?",
        ConfigError,
    )


def _look(folder: Path) -> tuple[CheckpointInfo | None, list[str]]:
    """What a checkpoint is, and what is wrong with it: equal on every rank."""

    def read() -> tuple[CheckpointInfo | None, list[str]]:
        try:
            return read_info(folder, what="run.directory"), []
        except ConfigError as error:
            return None, [str(error).removeprefix("run.directory: ")]

    info, problems = from_rank_zero(read)
    return info, problems or find_damage(folder, info) if info is not None else problems


def _check_together(config: RunConfig, inputs: Inputs, folder: Path, info: CheckpointInfo) -> None:
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


def with_settings(config: RunConfig, inputs: Inputs) -> Inputs:
    """`inputs` with what decides the weights. Rank 0 looks at data and teacher: one broadcast.

    ConfigError on every rank where a run would go on with other settings than it began with, and checkpoint.allow_changes does not say so.
    """
    here = from_rank_zero(lambda: settings_of(config, inputs))
    there = inputs.resume[1].settings if inputs.resume is not None else {}
    changed = differences(there, here) if there else []
    if changed and not config.checkpoint.allow_changes:
        raise ConfigError(
            f"run.directory: {config.run.directory} was trained with other settings ({'; '.join(changed)}): take them back, choose another "
            "run.directory, or set checkpoint.allow_changes = true to go on with the new ones"
        )
    return replace(inputs, settings=here, changed=tuple(changed))


def settle(inputs: Inputs, saver: Saver) -> None:
    """Note changes; give damaged checkpoints names under which nothing finds them; remove old ones. Rank 0, holding the run."""
    saver.clean()
    if inputs.changed and inputs.resume is not None:
        saver.log.warn(
            "settings",
            inputs.resume[1].step,
            f"going on with other settings: {'; '.join(inputs.changed)}",
        )
    for step, problem in inputs.passed_over:
        folder = step_folder(saver.checkpoints, step)
        try:
            aside = quarantine(folder)
        except OSError as error:
            saver.log.warn(
                "damaged",
                step,
                f"{folder} is damaged and cannot be renamed ({error.strerror}): {problem}",
            )
        else:
            saver.log.warn(
                "damaged",
                step,
                f"the damaged checkpoint of step {step} is now {aside}: remove it when you have looked at it",
            )
    if inputs.resume is not None and has_digests(*inputs.resume):
        # What a kill before the last rotation has left can go; after the damaged ones, which are not among those that stay.
        saver.verifier.add(inputs.resume[1].step, good=True)


def _warn(message: str) -> None:
    if dist.get_rank() == 0:
        print(f"megatron_kd: warning: {message}", file=sys.stderr, flush=True)
