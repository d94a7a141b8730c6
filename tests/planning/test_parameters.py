"""Parameters, FLOPs and memory of a model as tools/describe_model.py prints them."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_kd.config import ModelSection, RunConfig
from megatron_kd.config.hidden_state_pairs import projections_of
from megatron_kd.config.sections.hidden_states_pair import HiddenStatesPair
from megatron_kd.planning.flops import projection_flops_per_token
from megatron_kd.planning.parameters import parameter_count, rank_parameters
from megatron_kd.planning.planned_run import PlannedRun
from megatron_kd.planning.reports.describe import describe_run

TINY = {
    "hidden_size": 64,
    "num_layers": 4,
    "num_attention_heads": 4,
    "ffn_hidden_size": 128,
    "vocab_size": 512,
}
# Tokens of a microbatch of 2 sequences of 32 tokens.
TOKENS = 2 * 32


def tiny_config(**sections: dict[str, Any]) -> RunConfig:
    content: dict[str, Any] = {
        "model": TINY,
        "data": {"train": ["corpus/text"]},
        "batch": {"global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 32},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"steps": 10},
        "run": {"directory": "runs/first"},
    }
    for name, values in sections.items():
        content[name] = {**content.get(name, {}), **values}
    return RunConfig.model_validate(content)


def stages(
    config: RunConfig, ranks: int, teacher: ModelSection | None = None
) -> list[dict[str, int]]:
    return describe_run(PlannedRun(config, 512, teacher), ranks)["memory_per_rank"]


def test_stages_hold_the_whole_model() -> None:
    """The stages of one tensor-parallel rank hold every weight once, without padding."""
    model = ModelSection.model_validate({"preset": "qwen3-8b", "vocab_size_multiple": 1})
    counts = [
        rank_parameters(model, 151_936, tensor=1, pipeline=4, stage=stage) for stage in range(4)
    ]
    assert sum(counts) == parameter_count(model, 151_936)


def test_a_tied_head_on_another_stage_is_a_copy() -> None:
    tied = ModelSection.model_validate({"preset": "qwen3-4b", "vocab_size_multiple": 1})
    counts = [
        rank_parameters(tied, 151_936, tensor=1, pipeline=4, stage=stage) for stage in range(4)
    ]
    assert sum(counts) == parameter_count(tied, 151_936) + 151_936 * 2560


def test_memory_of_a_layout() -> None:
    """Counted by hand for a model small enough to do so."""
    config = tiny_config(batch={"global_batch_size": 16}, optimizer={"distributed": True})
    (stage,) = stages(config, 4)
    count = 512 * 64 * 2 + 4 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    assert stage["parameters"] == count
    assert stage["weights"] == 2 * count
    assert stage["gradients"] == 4 * count
    assert stage["optimizer"] == 12 * -(-count // 4)
    # Inputs and outputs of two norms; query and key before and after the rotary turn, value, and
    # the output of attention; gate, up and their product. Then rotary tables, and logsumexps in
    # fp32.
    layer = 2 * (TOKENS * (4 * 64 + 6 * 64 + 3 * 128) + 4 * 32 * 16) + 4 * TOKENS * 4
    angles, final_norm = 4 * 32 * 16, 2 * 2 * TOKENS * 64
    assert stage["activations"] == 4 * layer + angles + final_norm


def test_memory_of_pipeline_stages() -> None:
    config = tiny_config(parallel={"pipeline": 2}, train={"precision": "fp32"})
    first, last = stages(config, 2)
    # The last stage also keeps input and output of the final norm.
    assert first["activations"] == 2 * (last["activations"] - 2 * 4 * TOKENS * 64)
    assert last["optimizer"] == 8 * last["parameters"]


@pytest.mark.parametrize(("teacher_width", "projection_entries"), [(96, 64 * 96), (64, 0)])
def test_memory_of_hidden_states(teacher_width: int, projection_entries: int) -> None:
    """Two microbatches of 4 x 32 tokens; layers 1 and 2 of 4 are on the first stage."""
    pairs = [
        {"student_layer": student, "teacher_layer": teacher, "weight": 1}
        for student, teacher in ((1, 3), (2, 3), (4, 2))
    ]
    layout = {"parallel": {"pipeline": 2}, "batch": {"micro_batch_size": 4}}
    online = {"source": "online", "checkpoint": "t"}
    config = tiny_config(**layout, teacher=online, distill={"hidden_states": pairs})
    teacher = config.model.model_copy(update={"hidden_size": teacher_width})
    plain_first, plain_last = stages(tiny_config(**layout, teacher=online), 2, teacher)
    first, last = stages(config, 2, teacher)
    tokens = 4 * 32
    assert first["hidden_states"] == tokens * (2 * teacher_width + 2 * 2 * 64) * 2
    assert last["hidden_states"] == tokens * (2 * teacher_width + 1 * 64) * 2
    assert first["parameters"] - plain_first["parameters"] == 2 * projection_entries
    assert last["parameters"] - plain_last["parameters"] == projection_entries
    columns = ("weights", "gradients", "optimizer", "activations", "teacher", "hidden_states")
    assert first["total"] == sum(first[name] for name in columns)
    assert first["teacher"] == 2 * rank_parameters(teacher, 512, tensor=1, pipeline=2, stage=0)


def test_flops_of_projections() -> None:
    """Two entries of one pair of layers share a projection: forward, and two products backward."""
    pairs = [
        HiddenStatesPair(student_layer=student, teacher_layer=teacher, loss=loss, weight=1.0)
        for student, teacher, loss in [(1, 2, "mse"), (1, 2, "cosine"), (3, 1, "mse")]
    ]
    model = ModelSection.model_validate(TINY)
    wide = projections_of(pairs, model, model.model_copy(update={"hidden_size": 96}))
    assert projection_flops_per_token(model, wide) == 2 * 3 * (2 * 64 * 96)
    assert projection_flops_per_token(model, projections_of(pairs, model, model)) == 0
