"""Hidden states of chosen layers: right beside plain torch, alike in every layout, and nowhere but in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_kd.checkpoint.conversion.to_huggingface import write_huggingface
from megatron_kd.checkpoint.store import find_checkpoint, read_info
from megatron_kd.checkpoint.tensors import TensorReader
from megatron_kd.config import ConfigError, RunConfig
from megatron_kd.losses import reference_kd_cross_entropy
from megatron_kd.models.huggingface.safetensors import SafetensorsFolder
from megatron_kd.train.startup.input_checks import check_inputs
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny, write_tokens
from tests.layouts.layouts import Trained, worst_loss, worst_weight
from tests.losses.cases import fresh_seed
from tests.train.hidden_ranks import Ran, run_masked
from tests.train.plain import plain_adamw, plain_logits

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

STEPS, HALF, PLAIN_STEPS = 10, 5, 3
WIDTH, LAYERS = 48, 6  # of the wide teacher; the student and the other teacher: 32 wide, 4 layers
# At pipeline size 2 the first pair goes back one stage, the second forward one, the others stay.
PAIRS = [
    {"student_layer": 1, "teacher_layer": 6, "loss": "mse", "weight": 0.5},
    {"student_layer": 4, "teacher_layer": 1, "loss": "cosine", "weight": 0.3},
    {"student_layer": 2, "teacher_layer": 3, "loss": "mse", "weight": 0.7},
    {"student_layer": 2, "teacher_layer": 3, "loss": "cosine", "weight": 0.1},
    {"student_layer": 3, "teacher_layer": 4, "loss": "mse", "weight": 0.2},
]
SAME = [
    {"student_layer": 2, "teacher_layer": 3, "loss": "cosine", "weight": 0.6},
    {"student_layer": 4, "teacher_layer": 4, "weight": 5.0},
]
SELF = [{"student_layer": layer, "teacher_layer": layer, "weight": 1.0} for layer in (1, 4)]
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"parallel": {"tensor": 2}},
    "tp2_sp": {"parallel": {"tensor": 2, "sequence_parallel": True}},
    "pp2": {"parallel": {"pipeline": 2}, "model": {"recompute": "full"}},
    "pp2_vp2": {
        "parallel": {"pipeline": 2, "virtual_pipeline": 2},
        "batch": {"micro_batch_size": 1},
    },
    "dp2_overlap": {
        "optimizer": {"distributed": True},
        "parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True},
        "batch": {"micro_batch_size": 1},
    },
}
# Name: layout of the first half, layout of the second.
RESUMED = {"vp2_to_dp2": ("pp2_vp2", "dp2_overlap")}
RESUMED_SLOW = {
    "again_tp2_sp": ("tp2_sp", "tp2_sp"),
    "again_dp2": ("dp2_overlap", "dp2_overlap"),
    "tp2_sp_to_pp2": ("tp2_sp", "pp2"),
}


class Bench:
    """A folder with data, teachers, and runs that all start from one checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seed = folder, fresh_seed()
        self.data, self.valid = write_tokens(folder), write_tokens(folder, tokens=1_500, seed=1)

    def plain(self, name: str, **overrides: Any) -> RunConfig:
        return tiny(self.folder / name, self.data, **overrides)

    def config(
        self,
        name: str,
        pairs: list[dict[str, Any]] = PAIRS,
        *,
        teach: str = "wide",
        **overrides: Any,
    ) -> RunConfig:
        content: dict[str, Any] = {
            "teacher": {"source": "online", "checkpoint": str(self.folder / teach)},
            "distill": {"alpha": 0.4, "top_k": 8, "tail": "bucket", "hidden_states": pairs},
            "checkpoint": {"initialize_from": str(self.folder / "common")},
            "data": {"valid": {"held_out": self.valid}},
            "train": {"seed": self.seed % 2**31, "evaluate_batches": 1},
        }
        for section, keys in overrides.items():
            content[section] = {**content.get(section, {}), **keys}
        return self.plain(name, **content)


# Runs that plain torch repeats: teacher, pairs, alpha.
REPEATED: dict[str, tuple[str, list[dict[str, Any]], float]] = {
    "wide": ("wide", PAIRS, 0.4),
    "same": ("same", SAME, 1.0),
    "layers alone": ("wide", PAIRS[:1], 0.0),
}


def stepped(bench: Bench, name: str) -> tuple[RunConfig, int]:
    """A large eps, or the sign of a gradient that is rounding alone would move its weight by a whole learning rate."""
    teacher, pairs, alpha = REPEATED[name]
    optimizer = {"clip_grad": 0.2, "weight_decay": 0.1, "eps": 1e-4}
    return bench.config(
        f"stepped {name}", pairs, teach=teacher, optimizer=optimizer, distill={"alpha": alpha}
    ), PLAIN_STEPS


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("hidden"))


@pytest.fixture(scope="module")
def single(bench: Bench) -> dict[str, Any]:
    """The runs on one process; under "steps" those that plain torch repeats."""
    wide = {"hidden_size": WIDTH, "ffn_hidden_size": 96, "num_layers": LAYERS}
    faint = [{**pair, "weight": 1e-30} for pair in PAIRS]
    jobs = {
        "wide": (bench.plain("wide", model=wide), 10, True),
        "same": (bench.plain("same"), 10, True),
        "common": (bench.plain("common", train={"seed": 11}), 1, True),
        "one": (bench.config("one"), STEPS, True),
        "begun": (bench.config("again"), HALF, True),
        "ended": (bench.config("again"), STEPS, False),
        "recompute": (bench.config("recompute", model={"recompute": "full"}), HALF, False),
        "none": (bench.config("none", []), HALF, False),
        "faint": (bench.config("faint", faint), HALF, False),
        "same_width": (bench.config("same_width", SAME, teach="same"), STEPS, True),
        # A student with projections teaches another, and starts one with other pairs.
        "pupil": (
            bench.config(
                "pupil",
                SELF,
                teach="one",
                checkpoint={"initialize_from": str(bench.folder / "one")},
            ),
            1,
            False,
        ),
        "restart": (
            bench.config(
                "restart", PAIRS[1:2], checkpoint={"initialize_from": str(bench.folder / "one")}
            ),
            1,
            False,
        ),
        "bf16": (bench.config("bf16", train={"precision": "bf16"}), HALF, False),
    }
    repeated = {name: stepped(bench, name) for name in REPEATED}
    ran: Ran = run_ranks(run_masked, 1, list(jobs.values()), list(repeated.values()))[0]
    assert ran.sent == [None] * len(jobs)
    return {
        **dict(zip(jobs, ran.trained, strict=True)),
        "steps": dict(zip(repeated, ran.steps, strict=True)),
    }


def resumed_jobs(
    bench: Bench, names: dict[str, tuple[str, str]]
) -> dict[str, tuple[RunConfig, int, bool]]:
    """The same directory twice: half of the run in one layout, saved, and the rest in another."""
    jobs = {}
    for name, layouts in names.items():
        distributed = {"distributed": "dp2_overlap" in layouts}
        for part, layout, stop in zip(("first", "then"), layouts, (HALF, STEPS), strict=True):
            jobs[f"{name}_{part}"] = (
                bench.config(name, **{**LAYOUTS[layout], "optimizer": distributed}),
                stop,
                True,
            )
    return jobs


@pytest.fixture(scope="module")
def pair(bench: Bench, single: dict[str, Any]) -> dict[str, list[Any]]:
    """Two ranks in one world: of each run what it gave, and the bytes that each rank sent in it."""
    jobs = {
        name: (bench.config(name, **LAYOUTS[name]), STEPS, False)
        for name in ("tp2", "tp2_sp", "pp2")
    }
    return on_two_ranks({**jobs, **resumed_jobs(bench, RESUMED)})


@pytest.fixture(scope="module")
def pair_slow(bench: Bench, pair: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Further runs on two ranks. Saved ones: what is compared is what a checkpoint holds."""
    jobs = {
        name: (bench.config(name, **LAYOUTS[name]), STEPS, True)
        for name in ("pp2_vp2", "dp2_overlap")
    }
    jobs["dp2_unsaved"] = (bench.config("dp2_unsaved", **LAYOUTS["dp2_overlap"]), STEPS, False)
    jobs["same_pp2"] = (
        bench.config("same_pp2", SAME, teach="same", **LAYOUTS["pp2"]),
        STEPS,
        False,
    )
    return {**pair, **on_two_ranks({**jobs, **resumed_jobs(bench, RESUMED_SLOW)})}


def on_two_ranks(jobs: dict[str, tuple[RunConfig, int, bool]]) -> dict[str, list[Any]]:
    ran: list[Ran] = run_ranks(run_masked, 2, list(jobs.values()), timeout=500)
    return {
        name: [ran[0].trained[number], *(each.sent[number] for each in ran)]
        for number, name in enumerate(jobs)
    }


def check(found: Trained, wanted: Trained, name: str) -> None:
    """The same curve, and, where both are at the same step, the same weights and evaluation."""
    theirs = {row["step"]: row for row in wanted.records}
    assert worst_loss(found, wanted) <= 1e-5, name
    for row in found.records:
        other = theirs[row["step"]]
        assert row["hidden_loss"] == pytest.approx(other["hidden_loss"], rel=1e-5), (
            name,
            row["step"],
        )
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4), (name, row["step"])
        assert row["tokens"] == other["tokens"], (name, row["step"])
    if found.records[-1]["step"] == wanted.records[-1]["step"]:
        assert worst_weight(found, wanted) <= 1e-4, name
        for metric, value in wanted.validation["held_out"].items():
            known = value if value is None else pytest.approx(value, rel=1e-4)
            assert found.validation["held_out"][metric] == known, (name, metric)


# --- right --------------------------------------------------------------------------------------------------------------------------------


def hidden_loss(
    pairs: list[dict[str, Any]],
    student: list[Tensor],
    teacher: list[Tensor],
    weights: dict[str, Tensor],
) -> Tensor:
    """[B, S], written out by hand."""
    total = torch.zeros(student[0].shape[:2], dtype=torch.float64)
    for pair in pairs:
        s, t = student[pair["student_layer"] - 1], teacher[pair["teacher_layer"] - 1]
        projection = weights.get(
            f"hidden_projections.student{pair['student_layer']}_teacher{pair['teacher_layer']}.weight"
        )
        if projection is not None:
            s = torch.einsum("bsh,th->bst", s, projection)
        mse = ((s - t) ** 2).sum(-1) / t.shape[-1]
        cosine = 1 - (s * t).sum(-1) / ((s**2).sum(-1) * (t**2).sum(-1)).sqrt()
        total = total + pair["weight"] * (cosine if pair.get("loss") == "cosine" else mse)
    return total


@pytest.mark.parametrize("name", REPEATED)
def test_training_equals_plain_torch(bench: Bench, single: dict[str, Any], name: str) -> None:
    """Forward of both models, losses, gradient norm, clipping and AdamW in fp64."""
    teacher, pairs, alpha = REPEATED[name]
    engine, config = single["steps"][name], bench.config("unused")
    weights = {name: value.double().requires_grad_() for name, value in engine["before"].items()}
    assert ("wide" == teacher) == any(key.startswith("hidden_projections") for key in weights)
    theirs = {name: value.double() for name, value in single[teacher].weights.items()}
    their_model = read_info(
        find_checkpoint(bench.folder / teacher, setting="test"), setting="test"
    ).model_section()
    adam = plain_adamw(weights, weight_decay=0.1, lr=1.0, eps=1e-4)
    for step, row in enumerate(engine["rows"]):
        adam.zero_grad()
        total, hidden, count = torch.zeros((), dtype=torch.float64), 0.0, 0.0
        for (tokens, labels, mask), target in zip(
            engine["batches"][step], engine["targets"][step], strict=True
        ):
            wide = target.map(
                lambda t: t.transpose(0, 1).double() if t.is_floating_point() else t.transpose(0, 1)
            )
            ours: list[Tensor] = []
            taught: list[Tensor] = []
            logits = plain_logits(weights, config.model, tokens, ours)
            plain_logits(theirs, their_model, tokens, taught)
            loss = reference_kd_cross_entropy(logits, labels, wide, alpha=alpha, tail="bucket")
            own = (hidden_loss(pairs, ours, taught, weights) * mask).sum()
            total = total + (loss.total * mask).sum() + own
            hidden, count = hidden + float(own.detach()), count + float(mask.sum())
        assert 0 < count < 4 * 24, "some tokens must be masked"
        (total / count).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(weights.values(), 0.2))
        assert norm > 0.2, "the test must see clipping at work"
        assert row["total_loss"] == pytest.approx(float(total.detach()) / count, rel=2e-6)
        assert row["hidden_loss"] == pytest.approx(hidden / count, rel=2e-6)
        assert row["grad_norm"] == pytest.approx(norm, rel=2e-5)
        for group in adam.param_groups:
            group["lr"] = engine["learning_rates"][step]
        adam.step()
    for name, value in weights.items():
        rows = (
            slice(0, config.model.vocab_size)
            if name in ("embedding.word_embeddings.weight", "output_layer.weight")
            else slice(None)
        )
        worst = float((engine["after"][name][rows] - value.detach()[rows]).abs().max())
        moved = float((engine["after"][name][rows] - engine["before"][name][rows]).abs().max())
        assert worst <= 2e-3 * moved, (name, worst, moved)


def test_training_learns(single: dict[str, Any]) -> None:
    rows = single["one"].records
    assert rows[-1]["hidden_loss"] < 0.9 * rows[0]["hidden_loss"]
    assert single["none"].records[0]["hidden_loss"] is None
    assert rows[0]["total_loss"] == pytest.approx(
        single["none"].records[0]["total_loss"] + rows[0]["hidden_loss"], rel=1e-6
    )
    for row, other in zip(single["bf16"].records, rows, strict=False):
        assert row["hidden_loss"] == pytest.approx(other["hidden_loss"], rel=0.02)


def test_a_weight_near_nothing_is_the_plain_run(single: dict[str, Any]) -> None:
    faint, none = single["faint"], single["none"]
    for row, other in zip(faint.records, none.records, strict=True):
        # The norm is summed over the projections too, in another order.
        assert {
            **row,
            "hidden_loss": None,
            "grad_norm": pytest.approx(row["grad_norm"], rel=1e-6),
        } == other
    for name, value in none.weights.items():
        assert torch.equal(faint.weights[name], value), name


# --- alike --------------------------------------------------------------------------------------------------------------------------------


def test_recomputation_changes_nothing(single: dict[str, Any]) -> None:
    assert single["recompute"].records == single["one"].records[:HALF]


def test_two_ranks_equal_one(single: dict[str, Any], pair: dict[str, list[Any]]) -> None:
    for layout in ("tp2", "tp2_sp", "pp2"):
        assert len(pair[layout][0].records) == STEPS, layout
        check(pair[layout][0], single["one"], layout)


def check_resumed(
    names: dict[str, tuple[str, str]], single: dict[str, Any], found: dict[str, list[Any]]
) -> None:
    for name, (first, then) in names.items():
        begun, ended = found[f"{name}_first"][0], found[f"{name}_then"][0]
        assert [row["step"] for row in begun.records + ended.records] == list(
            range(1, STEPS + 1)
        ), name
        if first == then:
            assert begun.records + ended.records == found[first][0].records, name
            assert worst_weight(ended, found[first][0]) == 0.0, name
        check(begun, single["one"], name)
        check(ended, single["one"], name)


def test_resumed_in_the_same_layout_is_one_run(single: dict[str, Any]) -> None:
    begun, ended = single["begun"], single["ended"]
    assert begun.records + ended.records == single["one"].records
    assert worst_weight(ended, single["one"]) == 0.0


def test_resumed_in_another_layout(single: dict[str, Any], pair: dict[str, list[Any]]) -> None:
    check_resumed(RESUMED, single, pair)


@pytest.mark.slow
def test_further_layouts(single: dict[str, Any], pair_slow: dict[str, list[Any]]) -> None:
    for layout in ("pp2_vp2", "dp2_overlap"):
        check(pair_slow[layout][0], single["one"], layout)
    # The forward pass of an evaluation gathers weights by itself.
    held_out = [
        each.validation["held_out"]["total_loss"]
        for each in (single["one"], pair_slow["dp2_unsaved"][0])
    ]
    assert held_out[1] == pytest.approx(held_out[0], rel=1e-5)
    assert not any(name.startswith("hidden_projections") for name in single["same_width"].weights)
    check(pair_slow["same_pp2"][0], single["same_width"], "equal widths")
    check_resumed(RESUMED_SLOW, single, pair_slow)


def test_only_what_changes_stages_is_sent(pair: dict[str, list[Any]]) -> None:
    layer = 4 * 24 * WIDTH * 4  # sequences, tokens, width, bytes; each step, and in the evaluation
    sent = {name: found[1:] for name, found in pair.items()}
    # Interleaved, layers 1 and 3 are on the first stage: layers 6 and 4 of the teacher go there, 1 and 3 from there.
    assert sent["pp2"] == [(STEPS + 1) * layer] * 2
    assert sent["vp2_to_dp2_first"] == [(HALF + 1) * 2 * layer] * 2
    assert sent["tp2"] == sent["tp2_sp"] == sent["vp2_to_dp2_then"] == [None, None]


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
    jobs = [(bench.config(name, **over), STEPS, False) for name, over in layouts.items()]
    for name, found in zip(
        layouts, run_ranks(run_masked, 4, jobs, timeout=500)[0].trained, strict=True
    ):
        check(found, single["one"], name)


# --- in training alone --------------------------------------------------------------------------------------------------------------------


def test_no_projection_leaves_the_run(bench: Bench, single: dict[str, Any]) -> None:
    folder = find_checkpoint(bench.folder / "one", setting="test")
    info = read_info(folder, setting="test")
    stored = [
        name
        for name in TensorReader(folder, setting="test").tensors
        if name.startswith("hidden_projections")
    ]
    assert len(stored) == len(info.hidden_projections) == 4
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
    ("run", "changes", "words"),
    [
        (
            "one",
            {"pairs": PAIRS[:1]},
            r"trains projections of layer 1 to the teacher's 6 \(width 48\), .* this run of layer 1",
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
def test_what_does_not_fit_is_refused(
    bench: Bench, single: dict[str, Any], run: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_inputs(bench.config(run, **changes), world_size=1)


def test_losses_of_a_resumed_run_may_change(bench: Bench, single: dict[str, Any]) -> None:
    pairs = [
        {**pair, "weight": 9.0}
        for pair in PAIRS
        if pair["student_layer"] != 2 or pair["loss"] == "cosine"
    ]
    found = check_inputs(bench.config("one", pairs), world_size=1)
    assert found.resume is not None
    assert len(found.projections) == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"teacher": {"source": "none", "checkpoint": None}},
            'not of teacher.source = "none": set teacher.source = "online"',
        ),
        ({"teacher": {"source": "cached", "cache": "c"}}, 'not of teacher.source = "cached"'),
        (
            {"teacher": {"source": "cached", "cache": "c", "on_miss": "online"}},
            'not of teacher.source = "cached"',
        ),
        ({"teacher": {"source": "huggingface"}}, 'not of teacher.source = "huggingface"'),
        (
            {"teacher": {"parallel": {"tensor": 1}}},
            "needs the teacher in the student's layout: unset teacher.parallel",
        ),
        ({"teacher": {"micro_batch_size": 2}}, "needs the teacher in the student's layout"),
        (
            {"capture": {"directory": "c"}},
            "capture.directory stores a teacher's targets, not its layers",
        ),
        (
            {"model": {"mcore": {"recompute_granularity": "full"}}},
            'set model.recompute = "full" in place of',
        ),
        (
            {"model": {"mcore": {"cuda_graph_impl": "local"}}},
            "a CUDA graph replays: remove model.mcore.cuda_graph_impl",
        ),
        (
            {"pairs": [{**PAIRS[0], "student_layer": 5}]},
            "names student_layer 5, but model.num_layers is 4",
        ),
        (
            {"pairs": [*PAIRS, PAIRS[2]]},
            "compares student_layer 2 with teacher_layer 3 by mse more than once",
        ),
        ({"pairs": [{**PAIRS[0], "weight": 0}]}, "greater than 0"),
        ({"pairs": [{**PAIRS[0], "student_layer": 0}]}, "greater than 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    bench: Bench, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        bench.config("refused", **changes)
