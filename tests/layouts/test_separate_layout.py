"""A teacher in a layout of its own: the targets and the curve of one process, whatever the two layouts are."""

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
from tests.layouts.separate_layout_ranks import Asked, ask_all, ask_unevenly, run_ahead
from tests.losses.cases import fresh_seed, say

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

STEPS, K, SAMPLES = 20, 9, 8
LAYOUTS = [(1, 1), (1, 2), (2, 1), (2, 2)]  # (tensor, pipeline)
BATCH = {
    "global_batch_size": SAMPLES,
    "micro_batch_size": 2,
    "sequence_length": 25,
}  # not a multiple of the tensor-parallel size
SELECTIONS: dict[str, dict[str, Any]] = {
    "top": {"alpha": 0.7, "top_k": K, "top_p": 0.9, "tail": "bucket"},
    "draws": {"alpha": 0.7, "num_draws": K, "tail": "renormalize"},
}


class Bench:
    """A teacher, and runs that distil it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, write_tokens(folder)
        model = {"hidden_size": 48, "ffn_hidden_size": 96, "tied_embeddings": True}
        teacher = tiny(folder / "teacher", self.data, model=model, train={"steps": 40}, batch=BATCH)
        run_ranks(run_all, 1, [(teacher, 40, True)])

    def config(
        self,
        student: tuple[int, int] = (1, 1),
        own_layout: tuple[int, int] | None = None,
        /,
        **overrides: Any,
    ) -> RunConfig:
        tensor, pipeline = student
        own = (
            {"parallel": {"tensor": own_layout[0], "pipeline": own_layout[1]}} if own_layout else {}
        )
        settings: dict[str, Any] = {
            "batch": BATCH,
            "parallel": {"tensor": tensor, "pipeline": pipeline},
            "teacher": {"source": "online", "checkpoint": str(self.folder / "teacher"), **own},
        }
        for section, keys in {"distill": SELECTIONS["top"], **overrides}.items():
            settings[section] = {**settings.get(section, {}), **keys}
        return tiny(self.folder / "student", self.data, **settings)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("own_layout"))


@pytest.fixture(scope="module")
def single(bench: Bench) -> dict[str, Asked]:
    configs = {name: bench.config(distill=distill) for name, distill in SELECTIONS.items()}
    return dict(zip(configs, run_ranks(ask_all, 1, list(configs.values()), STEPS)[0], strict=True))


def check_targets(asked: Asked, wanted: Asked) -> None:
    assert set(asked.targets) == asked.expected  # its own samples' targets, and no other's
    for sample, (ids, *values) in asked.targets.items():
        assert torch.equal(ids, wanted.targets[sample][0])
        for value, other in zip(values, wanted.targets[sample][1:], strict=True):
            torch.testing.assert_close(value, other, rtol=0, atol=1e-6)


def check(found: list[Asked], wanted: Asked, *, entries: int = K) -> None:
    """found: of every rank."""
    for rank in found:
        check_targets(rank, wanted)
    assert set().union(*(rank.expected for rank in found)) == set(range(SAMPLES))
    assert sum(rank.sent for rank in found) / (SAMPLES * BATCH["sequence_length"]) <= 12 * entries
    for row, other in zip(found[0].records, wanted.records, strict=False):
        for name in ("total_loss", "ce_loss", "kd_loss"):
            assert abs(row[name] - other[name]) <= 1e-5 * other["total_loss"], (row["step"], name)


def run_pairs(
    bench: Bench, world: int, pairs: list[tuple[Any, Any]], steps: int, wanted: Asked
) -> None:
    by_rank = run_ranks(ask_all, world, [bench.config(*pair) for pair in pairs], steps, timeout=540)
    for number, pair in enumerate(pairs):
        found = [rank[number] for rank in by_rank]
        assert len(found[0].records) == steps
        try:
            check(found, wanted)
        except AssertionError as error:
            raise AssertionError(
                f"student {pair[0]}, teacher {pair[1]} on {world} ranks: {error}"
            ) from error


def pairs_of(world: int) -> list[tuple[Any, Any]]:
    fits = [layout for layout in LAYOUTS if layout[0] * layout[1] <= world]
    return list(product(fits, fits))


@pytest.mark.slow
def test_four_ranks(bench: Bench, single: dict[str, Asked]) -> None:
    run_pairs(bench, 4, [((1, 2), (2, 2)), ((2, 1), (1, 1))], 3, single["top"])


@pytest.mark.slow
@pytest.mark.parametrize(("world", "student"), [(2, None), *((4, student) for student in LAYOUTS)])
def test_every_pair_of_layouts(
    bench: Bench, single: dict[str, Asked], world: int, student: tuple[int, int] | None
) -> None:
    run_pairs(
        bench,
        world,
        [pair for pair in pairs_of(world) if student in (None, pair[0])],
        STEPS,
        single["top"],
    )


def test_two_ranks(bench: Bench, single: dict[str, Asked]) -> None:
    """Each layout that differs, random draws, other microbatches, virtual stages: in one world."""
    cases = {
        "tensor": ("top", bench.config((1, 1), (2, 1))),
        "across": ("top", bench.config((2, 1), (1, 2))),
        "draws": ("draws", bench.config((1, 2), (2, 1), distill=SELECTIONS["draws"])),
        "microbatches": ("top", bench.config((2, 1), teacher={"micro_batch_size": 1})),
        "virtual": ("top", bench.config((1, 2), (1, 1), parallel={"virtual_pipeline": 2})),
    }
    by_rank = run_ranks(ask_all, 2, [config for _, config in cases.values()], 4, timeout=300)
    for number, (wanted, _) in enumerate(cases.values()):
        check([rank[number] for rank in by_rank], single[wanted])


def test_replicas_that_ask_for_different_numbers(bench: Bench, single: dict[str, Asked]) -> None:
    counts = [[1, 2], [0, 1], [0, 0], [2, 0]]
    config = bench.config((1, 1), (2, 1), teacher={"micro_batch_size": 4})
    for rank in run_ranks(ask_unevenly, 2, config, counts):
        for asked in rank:
            check_targets(asked, single["top"])
    assert [len(asked.targets) for asked in rank] == [2 * each[1] for each in counts]


def ahead_pairs(bench: Bench, layouts: list[tuple[Any, Any, dict[str, Any]]]) -> list[RunConfig]:
    """Of each layout the run without and with a teacher that runs ahead."""
    valid = {"held_out": bench.data}
    return [
        bench.config(
            student,
            own,
            parallel=more,
            teacher={"overlap": overlap},
            data={"valid": valid},
            train={"evaluate_batches": 1},
        )
        for student, own, more in layouts
        for overlap in ("none", "drain")
    ]


def check_ahead(by_rank: list[list[tuple[bool, bool, list[float]]]]) -> None:
    for rank in by_rank:
        for (plain, _, wanted), (ahead, _, numbers) in zip(rank[::2], rank[1::2], strict=True):
            assert ahead
            assert not plain
            assert numbers == wanted  # to the bit


def test_a_step_ahead_on_two_ranks(bench: Bench) -> None:
    """A student's validation comes between a step ahead and its use."""
    layouts: list[tuple[Any, Any, dict[str, Any]]] = [
        ((1, 2), None, {}),
        ((1, 2), (2, 1), {"overlap_grad_reduce": True}),
        ((1, 2), (1, 2), {"virtual_pipeline": 2}),
        ((2, 1), (1, 2), {}),
    ]
    by_rank = run_ranks(run_ahead, 2, ahead_pairs(bench, layouts), 4, timeout=300)
    check_ahead(by_rank)
    assert [reversed_stages for _, reversed_stages, _ in by_rank[0]] == [
        False,
        True,
        False,
        False,
        False,
        True,
        False,
        False,
    ]


@pytest.mark.slow
def test_a_step_ahead_on_four_ranks(bench: Bench) -> None:
    layouts: list[tuple[Any, Any, dict[str, Any]]] = [
        ((1, 2), (2, 2), {}),
        ((2, 2), None, {}),
        ((1, 4), None, {}),
    ]
    check_ahead(run_ranks(run_ahead, 4, ahead_pairs(bench, layouts), 4, timeout=400))


@pytest.mark.slow
def test_samples_that_a_cache_lacks(bench: Bench, single: dict[str, Asked], tmp_path: Path) -> None:
    """Of a cache with some of the samples, and a live teacher in its own layout for the rest: the targets and curve of the live one."""
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
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    cached = {"source": "cached", "cache": str(tmp_path / "cache"), "on_miss": "online"}
    by_rank = run_ranks(ask_all, 2, [bench.config((1, 1), (2, 1), teacher=cached)], 6)
    check([found for (found,) in by_rank], single["top"])
    # The exchange carried some of them, and not all.
    whole = run_ranks(ask_all, 2, [bench.config((1, 1), (2, 1))], 0)
    assert 0 < sum(found.sent for (found,) in by_rank) < sum(found.sent for (found,) in whole)


def test_each_sample_belongs_to_one_of_each() -> None:
    seed = fresh_seed()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(200):
        owners, workers = (int(n) for n in torch.randint(1, 7, (2,), generator=generator))
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
    ("teacher", "world", "words"),
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
def test_what_does_not_divide_is_refused(
    bench: Bench, teacher: dict[str, Any], world: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_inputs(
            bench.config((2, 2) if world > 1 else (1, 1), teacher=teacher), world_size=world
        )


def test_what_cannot_have_its_own_layout(bench: Bench) -> None:
    with pytest.raises(ValueError, match="distill.dense needs the teacher in the student's layout"):
        bench.config((1, 1), (2, 1), distill={"alpha": 0.7, "dense": True})
    with pytest.raises(
        ValueError, match="teacher.parallel and teacher.micro_batch_size are for an online teacher"
    ):
        bench.config((1, 1), (2, 1), teacher={"source": "cached", "cache": "somewhere"})
