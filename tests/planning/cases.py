"""Small runs and a cluster with round numbers, for the tests of the planner."""

from __future__ import annotations

from typing import Any

from megatron_kd.config import ModelSection, RunConfig
from megatron_kd.planning.hardware import GIB, Cluster
from megatron_kd.planning.planned_run import PlannedRun
from megatron_kd.planning.step_time import ComputeRates

SHAPE = {
    "hidden_size": 512,
    "num_layers": 8,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "ffn_hidden_size": 1536,
    "vocab_size": 32000,
}
TEACHER = {
    **SHAPE,
    "hidden_size": 1024,
    "num_layers": 12,
    "num_attention_heads": 16,
    "ffn_hidden_size": 4096,
}
ONLINE = {
    "teacher": {"source": "online", "checkpoint": "none"},
    "distill": {"top_k": 16, "tail": "bucket"},
}
# Round numbers: 1 TFLOP/s, 100 GB/s of memory, 10 and 1 GB/s of links.
CLUSTER = Cluster(8, 4, 64 * GIB, 1e12, 1e11, 1e10, 1e9, latency=0.0, framework=0.0)
RATES = ComputeRates(4e11, 5e11)


def planned_run(
    *,
    teacher_shape: dict[str, Any] | None = None,
    device: str = "cuda",
    **sections: dict[str, Any],
) -> PlannedRun:
    """Return a small run on 64 sequences of 1024 tokens, with other values of its sections."""
    content: dict[str, Any] = {
        "model": SHAPE,
        "data": {"train": ["none"]},
        "batch": {"global_batch_size": 64, "micro_batch_size": 2, "sequence_length": 1024},
        "optimizer": {"learning_rate": 1e-4},
        "train": {"steps": 1},
        "run": {"directory": "none"},
    }
    for name, values in sections.items():
        content[name] = {**content.get(name, {}), **values}
    teacher = None if teacher_shape is None else ModelSection.model_validate(teacher_shape)
    return PlannedRun(RunConfig.model_validate(content), 32000, teacher, device)
