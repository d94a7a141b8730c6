"""A teacher with a precision of its own, and one whose weights are away between steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_kd.config import RunConfig
from megatron_kd.train.startup.input_checks import check_inputs
from tests.helpers.ranks import RankFailed, run_ranks
from tests.helpers.tiny import tiny, write_tokens
from tests.layouts.layouts import run_all

pytestmark = [pytest.mark.dist, pytest.mark.timeout(200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own_teacher")
    run_ranks(
        run_all,
        1,
        [
            (
                tiny(folder / "teacher", write_tokens(folder), model={"tied_embeddings": True}),
                20,
                True,
            )
        ],
    )
    return folder


def student(
    folder: Path, own: str = "fp32", /, *, distill: dict[str, Any] | None = None, **teacher: Any
) -> RunConfig:
    """own: the student's precision."""
    return tiny(
        folder / "student",
        str(folder / "tokens0"),
        train={"precision": own},
        distill=distill or {"top_k": 8, "tail": "bucket"},
        teacher={"source": "online", "checkpoint": str(folder / "teacher"), **teacher},
    )


def first_targets(
    rendezvous: str, configs: list[RunConfig]
) -> list[tuple[torch.dtype, list[torch.Tensor], float]]:
    """Of each run: the type of its teacher's weights, the first step's targets, and the first step's loss."""
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.train.build import build_run
    from megatron_kd.train.step import train_step

    found = []
    for number, config in enumerate(configs):
        run = build_run(config, rendezvous=f"{rendezvous}-{number}")
        targets = run.teacher.targets(run.train_data.microbatches(0))
        numbers = [target.logprobs for target in targets if hasattr(target, "logprobs")]
        kind = next(run.teacher.models[0].parameters()).dtype
        found.append((kind, numbers, train_step(run).metrics["total_loss"]))
        stop_groups()
    return found


def test_its_precision_is_its_own(folder: Path) -> None:
    """The targets are those of a run in the teacher's precision, whatever the student's is; sparse and whole distributions."""
    dense = {"dense": True, "divergence": "reverse_kl"}
    configs = [
        student(folder),
        student(folder, "bf16", precision="fp32"),
        student(folder, "bf16"),
        student(folder, "fp32", precision="bf16"),
        student(folder, "bf16", precision="fp32", distill=dense),
        student(folder, "fp32", precision="bf16", distill=dense),
    ]
    found = run_ranks(first_targets, 1, configs)[0]
    assert [kind for kind, _, _ in found[:4]] == [
        torch.float32,
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
    ]
    for one, other in ((0, 1), (2, 3)):
        for mine, theirs in zip(found[one][1], found[other][1], strict=True):
            assert torch.equal(mine, theirs)
    assert not torch.equal(found[0][1][0], found[2][1][0])
    assert all(loss == loss for _, _, loss in found)


def with_and_without(rendezvous: str, config: RunConfig) -> bool:
    """Whether weights that come and go give the same targets; where they are in between is checked here."""
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.teacher.runtime.offload import OffloadedWeights
    from megatron_kd.train.build import build_run

    run = build_run(config, rendezvous=rendezvous)
    microbatches = run.train_data.microbatches(0)
    wanted = run.teacher.targets(microbatches)
    weights = list(run.teacher.models[0].parameters())
    before = [weight.data_ptr() for weight in weights]
    away = OffloadedWeights(run.teacher.models, torch.device("cpu"))
    home = [weight.data_ptr() for weight in weights]
    assert not {*before} & {*home}
    run.teacher.resident = away
    for _ in range(2):
        for mine, theirs in zip(run.teacher.targets(microbatches), wanted, strict=True):
            assert all(
                torch.equal(a, b) for a, b in zip(mine.tensors(), theirs.tensors(), strict=True)
            )
        assert [weight.data_ptr() for weight in weights] == home
    with away:
        assert not {weight.data_ptr() for weight in weights} & {*home}
    stop_groups()
    return True


def test_weights_that_are_away_between_steps(folder: Path) -> None:
    assert run_ranks(with_and_without, 1, student(folder)) == [True]


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (
            {"offload": True},
            "teacher.offload keeps the teacher in CPU memory, where this run on a CPU has it anyway",
        ),
        ({"precision": "fp8"}, "needs Transformer Engine and a GPU that multiplies in fp8"),
    ],
)
def test_what_needs_a_gpu_says_so(folder: Path, teacher: dict[str, Any], words: str) -> None:
    config = student(folder, **teacher)
    check_inputs(config, world_size=1)
    with pytest.raises(RankFailed, match=words):
        run_ranks(run_all, 1, [(config, 1, False)])


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (
            {"source": "huggingface", "precision": "fp8"},
            'precision = "fp8" is for source = "online"',
        ),
        (
            {"source": "cached", "cache": "somewhere", "precision": "bf16"},
            "teacher.precision is for a teacher that runs in the job",
        ),
        (
            {"source": "cached", "cache": "somewhere", "overlap": "drain"},
            'overlap = "drain" is for source = "online"',
        ),
    ],
)
def test_what_does_not_go_together(folder: Path, teacher: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        student(folder, **teacher)


def test_whole_distributions_are_not_made_ahead(folder: Path) -> None:
    with pytest.raises(ValueError, match="need the teacher right before its student"):
        student(folder, distill={"dense": True}, overlap="drain")
