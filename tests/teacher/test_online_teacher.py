"""Run a teacher in its own precision, and offload its weights between steps."""

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
    folder = tmp_path_factory.mktemp("teacher")
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
    folder: Path,
    student_precision: str = "fp32",
    /,
    *,
    distill: dict[str, Any] | None = None,
    **teacher: Any,
) -> RunConfig:
    """Return the config of a student with the teacher in `folder`."""
    return tiny(
        folder / "student",
        str(folder / "tokens0"),
        train={"precision": student_precision},
        distill=distill or {"top_k": 8, "tail": "bucket"},
        teacher={"source": "online", "checkpoint": str(folder / "teacher"), **teacher},
    )


def first_targets(
    rendezvous: str, configs: list[RunConfig]
) -> list[tuple[torch.dtype, list[torch.Tensor], float]]:
    """Return the type of the teacher's weights, the first targets and the first loss per run."""
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.train.build import build_run
    from megatron_kd.train.step import train_step

    results = []
    for number, config in enumerate(configs):
        run = build_run(config, rendezvous=f"{rendezvous}-{number}")
        targets = run.teacher.targets(run.train_data.microbatches(0))
        numbers = [target.logprobs for target in targets if hasattr(target, "logprobs")]
        kind = next(run.teacher.models[0].parameters()).dtype
        results.append((kind, numbers, train_step(run).metrics["total_loss"]))
        stop_groups()
    return results


def test_precision_is_independent_of_the_student(folder: Path) -> None:
    """Compare targets with those of a run in the teacher's precision, sparse and dense."""
    dense = {"dense": True, "divergence": "reverse_kl"}
    configs = [
        student(folder),
        student(folder, "bf16", precision="fp32"),
        student(folder, "bf16"),
        student(folder, "fp32", precision="bf16"),
        student(folder, "bf16", precision="fp32", distill=dense),
        student(folder, "fp32", precision="bf16", distill=dense),
    ]
    results = run_ranks(first_targets, 1, configs)[0]
    assert [kind for kind, _, _ in results[:4]] == [
        torch.float32,
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
    ]
    for one, other in ((0, 1), (2, 3)):
        for target, expected in zip(results[one][1], results[other][1], strict=True):
            assert torch.equal(target, expected)
    assert not torch.equal(results[0][1][0], results[2][1][0])
    assert all(loss == loss for _, _, loss in results)


def offloading_keeps_targets(rendezvous: str, config: RunConfig) -> bool:
    """Return True if offloaded weights give equal targets; check where they are in between."""
    from megatron_kd.parallel.groups import stop_groups
    from megatron_kd.teacher.runtime.offload import OffloadedWeights
    from megatron_kd.train.build import build_run

    run = build_run(config, rendezvous=rendezvous)
    microbatches = run.train_data.microbatches(0)
    before_offloading = run.teacher.targets(microbatches)
    weights = list(run.teacher.models[0].parameters())
    device_pointers = [weight.data_ptr() for weight in weights]
    offloaded = OffloadedWeights(run.teacher.models, torch.device("cpu"))
    cpu_pointers = [weight.data_ptr() for weight in weights]
    assert not {*device_pointers} & {*cpu_pointers}
    run.teacher.resident = offloaded
    for _ in range(2):
        for target, expected in zip(
            run.teacher.targets(microbatches), before_offloading, strict=True
        ):
            assert all(
                torch.equal(a, b) for a, b in zip(target.tensors(), expected.tensors(), strict=True)
            )
        assert [weight.data_ptr() for weight in weights] == cpu_pointers
    with offloaded:
        assert not {weight.data_ptr() for weight in weights} & {*cpu_pointers}
    stop_groups()
    return True


def test_offloaded_weights_give_equal_targets(folder: Path) -> None:
    assert run_ranks(offloading_keeps_targets, 1, student(folder)) == [True]


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (
            {"offload": True},
            "teacher.offload keeps the teacher in CPU memory, where this run on a CPU has it",
        ),
        ({"precision": "fp8"}, "needs Transformer Engine and a GPU that multiplies in fp8"),
    ],
)
def test_gpu_features_are_refused_on_a_cpu(
    folder: Path, teacher: dict[str, Any], words: str
) -> None:
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
def test_conflicting_keys_are_refused(folder: Path, teacher: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        student(folder, **teacher)


def test_dense_targets_do_not_overlap_the_drain(folder: Path) -> None:
    with pytest.raises(ValueError, match="need the teacher right before its student"):
        student(folder, distill={"dense": True}, overlap="drain")
