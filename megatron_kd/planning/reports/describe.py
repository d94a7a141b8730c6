"""Describe a model by its parameters, FLOPs per token and memory per rank."""

from __future__ import annotations

from typing import Any

from megatron_kd.config import ModelSection
from megatron_kd.config.presets import PRESETS
from megatron_kd.planning.flops import flops_per_token
from megatron_kd.planning.memory import RankMemory, run_memory
from megatron_kd.planning.parameters import parameter_counts
from megatron_kd.planning.planned_run import PlannedRun


def describe_run(run: PlannedRun, ranks: int | None = None) -> dict[str, Any]:
    """Return the plain numbers of a run's model: parameters, FLOPs, bytes per rank.

    Args:
        run: the run.
        ranks: number of ranks; None: one data-parallel replica.

    Raises:
        ConfigError: if the number of ranks does not fit the layout.
    """
    config, vocab_size = run.config, run.vocab_size
    model, length = config.model, config.batch.sequence_length
    world_size = ranks or config.parallel.tensor * config.parallel.pipeline
    description: dict[str, Any] = {
        "model": model.model_dump(mode="json", exclude_none=True),
        "vocab_size": vocab_size,
        "parameters": parameter_counts(model, vocab_size),
        "sequence_length": length,
        "flops_per_token": {
            "training": flops_per_token(model, vocab_size, length),
            "forward": flops_per_token(model, vocab_size, length, forward_only=True),
        },
        "layout": {
            "ranks": world_size,
            **config.parallel.model_dump(),
            "data": config.data_parallel_size(world_size),
        },
        "memory_per_rank": [_memory_numbers(rank) for rank in run_memory(run, world_size)],
    }
    if run.teacher is not None:
        forward = flops_per_token(run.teacher, vocab_size, length, forward_only=True)
        description["teacher"] = {
            "parameters": parameter_counts(run.teacher, vocab_size),
            "flops_per_token": {"forward": forward},
        }
    return description


def _memory_numbers(rank: RankMemory) -> dict[str, int]:
    """Return what training keeps on a rank between the passes of a step."""
    sizes = {
        "weights": rank.parts["weights"],
        "gradients": rank.parts["gradients"],
        "optimizer": rank.parts["optimizer"],
        "activations": rank.kept_activations,
        "teacher": rank.parts["teacher weights"],
        "hidden_states": rank.parts["hidden states"],
    }
    numbers = {name: round(size) for name, size in sizes.items()}
    return {
        "stage": rank.stage,
        "parameters": rank.parameters,
        **numbers,
        "total": sum(numbers.values()),
    }


def describe_presets() -> list[dict[str, Any]]:
    """Return the name, parameters and shape of each preset."""
    descriptions = []
    for name, values in PRESETS.items():
        model = ModelSection.model_validate({"preset": name})
        parameters = parameter_counts(model, values["vocab_size"])
        descriptions.append({"preset": name, "parameters": parameters, **values})
    return descriptions
