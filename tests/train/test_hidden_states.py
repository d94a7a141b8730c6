"""Compare hidden states: with plain torch, between layouts, and across checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_kd.checkpoint.conversion.to_huggingface import write_huggingface
from megatron_kd.checkpoint.store import find_checkpoint, read_info
from megatron_kd.checkpoint.tensors import TensorReader
from megatron_kd.config import ConfigError
from megatron_kd.models.huggingface.safetensors import SafetensorsFolder
from megatron_kd.train.startup.input_checks import check_inputs
from tests.helpers.ranks import run_ranks
from tests.layouts.layouts import worst_weight
from tests.train.hidden_cases import (
    HALF,
    LAYOUTS,
    PAIRS,
    REPEATED,
    RESUMED,
    RESUMED_SLOW,
    SAME,
    STEPS,
    WIDTH,
    Bench,
    TwoRankRun,
    check_resumed,
    check_run,
    repeated_run,
    resumed_jobs,
    run_on_two_ranks,
    single_jobs,
)
from tests.train.hidden_plain import PlainModels
from tests.train.hidden_ranks import RankResult, run_masked
from tests.train.plain import check_weights, plain_adamw, update

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("hidden"))


@pytest.fixture(scope="module")
def single(bench: Bench) -> dict[str, Any]:
    """Train the runs on one process; "steps" holds those that plain torch repeats."""
    jobs = single_jobs(bench)
    repeated = {name: repeated_run(bench, name) for name in REPEATED}
    result: RankResult = run_ranks(run_masked, 1, list(jobs.values()), list(repeated.values()))[0]
    assert result.sent == [None] * len(jobs)
    return {
        **dict(zip(jobs, result.trained, strict=True)),
        "steps": dict(zip(repeated, result.steps, strict=True)),
    }


@pytest.fixture(scope="module")
def two_ranks(bench: Bench, single: dict[str, Any]) -> dict[str, TwoRankRun]:
    """Train runs on two ranks in one world."""
    jobs = {
        name: (bench.config(name, **LAYOUTS[name]), STEPS, False)
        for name in ("tp2", "tp2_sp", "pp2")
    }
    return run_on_two_ranks({**jobs, **resumed_jobs(bench, RESUMED)})


@pytest.fixture(scope="module")
def two_ranks_slow(bench: Bench, two_ranks: dict[str, TwoRankRun]) -> dict[str, TwoRankRun]:
    """Train further runs on two ranks. Most are saved, to compare what a checkpoint holds."""
    jobs = {
        name: (bench.config(name, **LAYOUTS[name]), STEPS, True)
        for name in ("pp2_vp2", "dp2_overlap")
    }
    jobs["dp2_unsaved"] = (bench.config("dp2_unsaved", **LAYOUTS["dp2_overlap"]), STEPS, False)
    jobs["same_pp2"] = (
        bench.config("same_pp2", SAME, teacher_run="same", **LAYOUTS["pp2"]),
        STEPS,
        False,
    )
    return {**two_ranks, **run_on_two_ranks({**jobs, **resumed_jobs(bench, RESUMED_SLOW)})}


@pytest.mark.parametrize("name", REPEATED)
def test_training_equals_plain_torch(bench: Bench, single: dict[str, Any], name: str) -> None:
    """Compare forward of both models, losses, gradient norm, clipping and AdamW in fp64."""
    teacher, pairs, alpha = REPEATED[name]
    engine, student = single["steps"][name], bench.config("unused").model
    weights = {key: value.double().requires_grad_() for key, value in engine["before"].items()}
    assert ("wide" == teacher) == any(key.startswith("hidden_projections") for key in weights)
    teacher_weights = {key: value.double() for key, value in single[teacher].weights.items()}
    checkpoint = find_checkpoint(bench.folder / teacher, setting="test")
    teacher_model = read_info(checkpoint, setting="test").model_section()
    plain = PlainModels((student, weights), (teacher_model, teacher_weights), pairs, alpha)
    adam = plain_adamw(weights, weight_decay=0.1, lr=1.0, eps=1e-4)
    for step, record in enumerate(engine["records"]):
        adam.zero_grad()
        total, hidden, count = plain.loss_sums(engine["batches"][step], engine["targets"][step])
        assert 0 < count < 4 * 24, "some tokens must be masked"
        (total / count).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(weights.values(), 0.2))
        assert norm > 0.2, "the test must exercise clipping"
        assert record["total_loss"] == pytest.approx(float(total.detach()) / count, rel=2e-6)
        assert record["hidden_loss"] == pytest.approx(hidden / count, rel=2e-6)
        assert record["grad_norm"] == pytest.approx(norm, rel=2e-5)
        update(adam, engine["learning_rates"][step])
    check_weights(engine["before"], engine["after"], weights, student.vocab_size)


def test_training_learns(single: dict[str, Any]) -> None:
    records = single["one"].records
    assert records[-1]["hidden_loss"] < 0.9 * records[0]["hidden_loss"]
    assert single["none"].records[0]["hidden_loss"] is None
    assert records[0]["total_loss"] == pytest.approx(
        single["none"].records[0]["total_loss"] + records[0]["hidden_loss"], rel=1e-6
    )
    for record, other in zip(single["bf16"].records, records, strict=False):
        assert record["hidden_loss"] == pytest.approx(other["hidden_loss"], rel=0.02)


def test_tiny_weight_equals_run_without_hidden_states(single: dict[str, Any]) -> None:
    faint, none = single["faint"], single["none"]
    for record, other in zip(faint.records, none.records, strict=True):
        # The norm is summed over the projections too, in another order.
        norm = pytest.approx(record["grad_norm"], rel=1e-6)
        assert {**record, "hidden_loss": None, "grad_norm": norm} == other
    for name, value in none.weights.items():
        assert torch.equal(faint.weights[name], value), name


def test_recomputation_changes_nothing(single: dict[str, Any]) -> None:
    assert single["recompute"].records == single["one"].records[:HALF]


def test_two_ranks_equal_one(single: dict[str, Any], two_ranks: dict[str, TwoRankRun]) -> None:
    for layout in ("tp2", "tp2_sp", "pp2"):
        assert len(two_ranks[layout].trained.records) == STEPS, layout
        check_run(two_ranks[layout].trained, single["one"], layout)


def test_resumed_in_the_same_layout_is_one_run(single: dict[str, Any]) -> None:
    first, second = single["first_half"], single["second_half"]
    assert first.records + second.records == single["one"].records
    assert worst_weight(second, single["one"]) == 0.0


def test_resumed_in_another_layout(
    single: dict[str, Any], two_ranks: dict[str, TwoRankRun]
) -> None:
    check_resumed(RESUMED, single, two_ranks)


@pytest.mark.slow
def test_further_layouts(single: dict[str, Any], two_ranks_slow: dict[str, TwoRankRun]) -> None:
    for layout in ("pp2_vp2", "dp2_overlap"):
        check_run(two_ranks_slow[layout].trained, single["one"], layout)
    # The forward pass of an evaluation gathers weights by itself.
    reference, unsaved = single["one"], two_ranks_slow["dp2_unsaved"].trained
    assert unsaved.validation["held_out"]["total_loss"] == pytest.approx(
        reference.validation["held_out"]["total_loss"], rel=1e-5
    )
    assert not any(name.startswith("hidden_projections") for name in single["same_width"].weights)
    check_run(two_ranks_slow["same_pp2"].trained, single["same_width"], "equal widths")
    check_resumed(RESUMED_SLOW, single, two_ranks_slow)


def test_only_layers_that_change_stages_are_sent(two_ranks: dict[str, TwoRankRun]) -> None:
    layer = 4 * 24 * WIDTH * 4  # sequences, tokens, width, bytes; each step, and in the evaluation
    sent = {name: run.sent for name, run in two_ranks.items()}
    assert sent["pp2"] == [(STEPS + 1) * layer] * 2
    # Interleaved, the first stage has the student's layers 1 and 3: the teacher's layers 6 and 4
    # are sent to it, 1 and 3 from it.
    assert sent["vp2_to_dp2_first"] == [(HALF + 1) * 2 * layer] * 2
    for name in ("tp2", "tp2_sp", "vp2_to_dp2_second"):
        assert sent[name] == [None, None], name


@pytest.mark.slow
def test_four_ranks_equal_one(bench: Bench, single: dict[str, Any]) -> None:
    layouts = {
        "tp2_sp_pp2": {"parallel": {"tensor": 2, "sequence_parallel": True, "pipeline": 2}},
        "pp2_dp2": {"parallel": {"pipeline": 2}, "optimizer": {"distributed": True}},
        "tp2_pp2_vp2": {
            "parallel": {"pipeline": 2, "virtual_pipeline": 2, "tensor": 2},
            "batch": {"micro_batch_size": 1},
        },
    }
    jobs = [(bench.config(name, **layout), STEPS, False) for name, layout in layouts.items()]
    rank: RankResult = run_ranks(run_masked, 4, jobs, timeout=500)[0]
    for name, trained in zip(layouts, rank.trained, strict=True):
        check_run(trained, single["one"], name)


def test_projections_stay_in_training(bench: Bench, single: dict[str, Any]) -> None:
    folder = find_checkpoint(bench.folder / "one", setting="test")
    info = read_info(folder, setting="test")
    stored = [
        name
        for name in TensorReader(folder, setting="test").tensors
        if name.startswith("hidden_projections")
    ]
    assert len(stored) == len(info.hidden_projections)
    assert len(stored) == 4
    write_huggingface(bench.folder / "exported", folder, info, max_positions=64)
    names = set(SafetensorsFolder(bench.folder / "exported", setting="test").tensors)
    plain = find_checkpoint(bench.folder / "same", setting="test")
    write_huggingface(
        bench.folder / "exported_plain", plain, read_info(plain, setting="test"), max_positions=64
    )
    assert names == set(SafetensorsFolder(bench.folder / "exported_plain", setting="test").tensors)
    assert single["pupil"].records[0]["hidden_loss"] == 0.0, "a student that is its own teacher"
    projections = {
        name for name in single["restart"].weights if name.startswith("hidden_projections")
    }
    assert projections == {"hidden_projections.student4_teacher1.weight"}


@pytest.mark.parametrize(
    ("run", "changes", "message"),
    [
        (
            "one",
            {"pairs": PAIRS[:1]},
            r"trains projections of layer 1 to the teacher's 6 \(width 48\), "
            ".* this run of layer 1",
        ),
        ("one", {"pairs": []}, "this run of no layer: continue with the same pairs"),
        ("same_width", {"pairs": PAIRS}, "trains projections of no layer, this run of layer 1"),
        (
            "new",
            {"pairs": [{**PAIRS[0], "teacher_layer": 7}]},
            "names teacher_layer 7, but the teacher .* has 6 layers",
        ),
    ],
)
def test_pairs_that_do_not_fit_are_refused(
    bench: Bench, single: dict[str, Any], run: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_inputs(bench.config(run, **changes), world_size=1)


def test_losses_of_a_resumed_run_may_change(bench: Bench, single: dict[str, Any]) -> None:
    pairs = [
        {**pair, "weight": 9.0}
        for pair in PAIRS
        if pair["student_layer"] != 2 or pair["loss"] == "cosine"
    ]
    inputs = check_inputs(bench.config("one", pairs), world_size=1)
    assert inputs.resume is not None
    assert len(inputs.projections) == 4
