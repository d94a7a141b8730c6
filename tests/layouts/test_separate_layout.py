"""Compare a teacher in a separate layout with one process: targets and loss curve."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_kd.config import ConfigError, RunConfig, dump_toml
from megatron_kd.teacher.runtime.split import Split
from megatron_kd.train.startup.input_checks import check_inputs
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny, write_tokens
from tests.layouts.layouts import run_all
from tests.layouts.separate_layout_ranks import (
    OverlapRun,
    TeacherRun,
    request_unevenly,
    train_all,
    train_with_overlap,
)
from tests.losses.cases import fresh_seed, say

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

STEPS, K, SAMPLES = 20, 9, 8
LAYOUTS = [(1, 1), (1, 2), (2, 1), (2, 2)]  # (tensor, pipeline)
BATCH = {
    "global_batch_size": SAMPLES,
    "micro_batch_size": 2,
    # Not a multiple of the tensor-parallel size.
    "sequence_length": 25,
}
SELECTIONS: dict[str, dict[str, Any]] = {
    "top": {"alpha": 0.7, "top_k": K, "top_p": 0.9, "tail": "bucket"},
    "draws": {"alpha": 0.7, "num_draws": K, "tail": "renormalize"},
}


class Bench:
    """Train a teacher and configure runs that distil it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, write_tokens(folder)
        model = {"hidden_size": 48, "ffn_hidden_size": 96, "tied_embeddings": True}
        teacher = tiny(folder / "teacher", self.data, model=model, train={"steps": 40}, batch=BATCH)
        run_ranks(run_all, 1, [(teacher, 40, True)])

    def config(
        self,
        student: tuple[int, int] = (1, 1),
        separate: tuple[int, int] | None = None,
        /,
        **overrides: Any,
    ) -> RunConfig:
        """Return a run with these (tensor, pipeline) sizes of the student and of the teacher."""
        teacher: dict[str, Any] = {
            "source": "online",
            "checkpoint": str(self.folder / "teacher"),
        }
        if separate is not None:
            teacher["parallel"] = {"tensor": separate[0], "pipeline": separate[1]}
        settings: dict[str, Any] = {
            "batch": BATCH,
            "parallel": {"tensor": student[0], "pipeline": student[1]},
            "teacher": teacher,
        }
        for section, keys in {"distill": SELECTIONS["top"], **overrides}.items():
            settings[section] = {**settings.get(section, {}), **keys}
        return tiny(self.folder / "student", self.data, **settings)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("separate_layout"))


@pytest.fixture(scope="module")
def single(bench: Bench) -> dict[str, TeacherRun]:
    configs = {name: bench.config(distill=distill) for name, distill in SELECTIONS.items()}
    return dict(
        zip(configs, run_ranks(train_all, 1, list(configs.values()), STEPS)[0], strict=True)
    )


def check_targets(run: TeacherRun, reference: TeacherRun) -> None:
    """Check that a rank received the targets of its own samples, and no others."""
    assert set(run.targets) == run.expected
    for sample, (ids, *values) in run.targets.items():
        assert torch.equal(ids, reference.targets[sample][0])
        for value, other in zip(values, reference.targets[sample][1:], strict=True):
            torch.testing.assert_close(value, other, rtol=0, atol=1e-6)


def check(ranks: list[TeacherRun], reference: TeacherRun, *, entries: int = K) -> None:
    """Compare the results of all ranks with the run of one process."""
    for rank in ranks:
        check_targets(rank, reference)
    assert set().union(*(rank.expected for rank in ranks)) == set(range(SAMPLES))
    assert sum(rank.sent for rank in ranks) / (SAMPLES * BATCH["sequence_length"]) <= 12 * entries
    for record, other in zip(ranks[0].records, reference.records, strict=False):
        for name in ("total_loss", "ce_loss", "kd_loss"):
            difference = abs(record[name] - other[name])
            assert difference <= 1e-5 * other["total_loss"], (record["step"], name)


def run_pairs(
    bench: Bench, world: int, pairs: list[tuple[Any, Any]], steps: int, reference: TeacherRun
) -> None:
    """Train every (student, teacher) pair of layouts on `world` ranks and check each."""
    configs = [bench.config(*pair) for pair in pairs]
    by_rank = run_ranks(train_all, world, configs, steps, timeout=540)
    for number, pair in enumerate(pairs):
        ranks = [rank[number] for rank in by_rank]
        assert len(ranks[0].records) == steps
        try:
            check(ranks, reference)
        except AssertionError as error:
            raise AssertionError(
                f"student {pair[0]}, teacher {pair[1]} on {world} ranks: {error}"
            ) from error


def pairs_of(world: int) -> list[tuple[Any, Any]]:
    layouts = [layout for layout in LAYOUTS if layout[0] * layout[1] <= world]
    return list(product(layouts, layouts))


@pytest.mark.slow
def test_four_ranks(bench: Bench, single: dict[str, TeacherRun]) -> None:
    run_pairs(bench, 4, [((1, 2), (2, 2)), ((2, 1), (1, 1))], 3, single["top"])


@pytest.mark.slow
@pytest.mark.parametrize(("world", "student"), [(2, None), *((4, student) for student in LAYOUTS)])
def test_every_pair_of_layouts(
    bench: Bench, single: dict[str, TeacherRun], world: int, student: tuple[int, int] | None
) -> None:
    run_pairs(
        bench,
        world,
        [pair for pair in pairs_of(world) if student in (None, pair[0])],
        STEPS,
        single["top"],
    )


def test_two_ranks(bench: Bench, single: dict[str, TeacherRun]) -> None:
    """Train different layouts, random draws, other microbatches and virtual stages in one world."""
    cases = {
        "tensor": ("top", bench.config((1, 1), (2, 1))),
        "across": ("top", bench.config((2, 1), (1, 2))),
        "draws": ("draws", bench.config((1, 2), (2, 1), distill=SELECTIONS["draws"])),
        "microbatches": ("top", bench.config((2, 1), teacher={"micro_batch_size": 1})),
        "virtual": ("top", bench.config((1, 2), (1, 1), parallel={"virtual_pipeline": 2})),
    }
    by_rank = run_ranks(train_all, 2, [config for _, config in cases.values()], 4, timeout=300)
    for number, (selection, _) in enumerate(cases.values()):
        check([rank[number] for rank in by_rank], single[selection])


def test_replicas_that_request_different_numbers(
    bench: Bench, single: dict[str, TeacherRun]
) -> None:
    counts = [[1, 2], [0, 1], [0, 0], [2, 0]]
    config = bench.config((1, 1), (2, 1), teacher={"micro_batch_size": 4})
    for rank in run_ranks(request_unevenly, 2, config, counts):
        for result in rank:
            check_targets(result, single["top"])
    assert [len(result.targets) for result in rank] == [2 * second for _, second in counts]


def overlap_configs(
    bench: Bench, layouts: list[tuple[Any, Any, dict[str, Any]]]
) -> list[RunConfig]:
    """Return two runs of each layout: without and with a teacher that runs a step ahead."""
    valid = {"held_out": bench.data}
    return [
        bench.config(
            student,
            separate,
            parallel=parallel,
            teacher={"overlap": overlap},
            data={"valid": valid},
            train={"evaluate_batches": 1},
        )
        for student, separate, parallel in layouts
        for overlap in ("none", "drain")
    ]


def check_overlap(by_rank: list[list[OverlapRun]]) -> None:
    """Check that running a step ahead changes no bit of any number."""
    for runs in by_rank:
        for plain, drain in zip(runs[::2], runs[1::2], strict=True):
            assert drain.prefetches
            assert not plain.prefetches
            assert drain.numbers == plain.numbers


def test_a_step_ahead_on_two_ranks(bench: Bench) -> None:
    """Run a validation of the student between the prefetch of a step and its use."""
    layouts: list[tuple[Any, Any, dict[str, Any]]] = [
        ((1, 2), None, {}),
        ((1, 2), (2, 1), {"overlap_grad_reduce": True}),
        ((1, 2), (1, 2), {"virtual_pipeline": 2}),
        ((2, 1), (1, 2), {}),
    ]
    by_rank = run_ranks(train_with_overlap, 2, overlap_configs(bench, layouts), 4, timeout=300)
    check_overlap(by_rank)
    without, with_overlap = by_rank[0][::2], by_rank[0][1::2]
    assert [run.reversed_stages for run in without] == [False, False, False, False]
    assert [run.reversed_stages for run in with_overlap] == [True, False, True, False]


@pytest.mark.slow
def test_a_step_ahead_on_four_ranks(bench: Bench) -> None:
    layouts: list[tuple[Any, Any, dict[str, Any]]] = [
        ((1, 2), (2, 2), {}),
        ((2, 2), None, {}),
        ((1, 4), None, {}),
    ]
    configs = overlap_configs(bench, layouts)
    check_overlap(run_ranks(train_with_overlap, 4, configs, 4, timeout=400))


@pytest.mark.slow
def test_samples_that_a_cache_lacks(
    bench: Bench, single: dict[str, TeacherRun], tmp_path: Path
) -> None:
    """Train from a cache of some samples and a live teacher in a separate layout for the rest.

    Targets and curve equal those of the live teacher alone.
    """
    run_file = tmp_path / "run.toml"
    run_file.write_text(dump_toml(bench.config()), encoding="utf-8")
    options = [
        "--output",
        str(tmp_path / "cache"),
        "--first-samples",
        "300",
        "--value-encoding",
        "fp32",
    ]
    command = [sys.executable, "tools/cache_teacher.py", "--config", str(run_file), *options]
    process = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=200
    )
    assert process.returncode == 0, process.stderr
    cached = {"source": "cached", "cache": str(tmp_path / "cache"), "on_miss": "online"}
    by_rank = run_ranks(train_all, 2, [bench.config((1, 1), (2, 1), teacher=cached)], 6)
    check([result for (result,) in by_rank], single["top"])
    # The exchange carried some of the targets, but not all.
    online = run_ranks(train_all, 2, [bench.config((1, 1), (2, 1))], 0)
    sent = sum(result.sent for (result,) in by_rank)
    assert 0 < sent < sum(result.sent for (result,) in online)


def test_each_sample_belongs_to_one_student_and_one_teacher_replica() -> None:
    seed = fresh_seed()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(200):
        owners, workers = (int(size) for size in torch.randint(1, 7, (2,), generator=generator))
        split = Split(tuple(torch.randint(0, 9, (owners,), generator=generator).tolist()), workers)
        samples = [sample for part in split.ranges() for sample in range(part.start, part.stop)]
        assert samples == list(range(split.total)), say(seed, split)
        for part in split.ranges():
            for sample in (part.start, part.stop - 1):
                assert sample in split.of_student(part.student), say(seed, split, part)
                assert sample in split.of_teacher(part.teacher), say(seed, split, part)
        shares = [len(split.of_teacher(worker)) for worker in range(workers)]
        assert max(shares) - min(shares) <= 1, say(seed, split)


@pytest.mark.parametrize(
    ("teacher", "world", "message"),
    [
        (
            {"parallel": {"tensor": 3}},
            4,
            "4 processes cannot be split into teacher.parallel.tensor",
        ),
        ({"micro_batch_size": 3}, 1, "must be a multiple of the teacher's micro-batch size"),
        (
            {"parallel": {"tensor": 4, "pipeline": 1}},
            4,
            "num_query_groups = 2, which 4 tensor-parallel ranks cannot share",
        ),
        (
            {"parallel": {"tensor": 1, "pipeline": 8}},
            8,
            "num_layers = 4, which 8 pipeline-parallel ranks cannot share",
        ),
    ],
)
def test_layout_that_does_not_divide_is_refused(
    bench: Bench, teacher: dict[str, Any], world: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_inputs(
            bench.config((2, 2) if world > 1 else (1, 1), teacher=teacher), world_size=world
        )


def test_teachers_without_a_separate_layout_are_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match="distill.dense needs the teacher in the student's layout"):
        bench.config((1, 1), (2, 1), distill={"alpha": 0.7, "dense": True})
    with pytest.raises(
        ValueError, match="teacher.parallel and teacher.micro_batch_size are for an online teacher"
    ):
        bench.config((1, 1), (2, 1), teacher={"source": "cached", "cache": "somewhere"})
