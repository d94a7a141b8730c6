"""Compare a teacher that transformers runs with the converted one: equal losses in all layouts."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_kd.checkpoint.conversion.from_huggingface import open_huggingface, write_checkpoint
from megatron_kd.config import ConfigError, ModelSection, RunConfig
from megatron_kd.train.startup.input_checks import check_inputs
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import VOCAB, tiny, write_tokens
from tests.layouts.layouts import worst_loss
from tests.layouts.separate_layout_ranks import TeacherRun, train_all
from tests.losses.cases import fresh_seed
from tests.models.folders import write_folder

STEPS = 3
TEACHER = ModelSection(
    hidden_size=48,
    num_layers=2,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=64,
    vocab_size=VOCAB,
    rope_base=5e4,
    qkv_bias=True,
)
DISTILL: dict[str, Any] = {"alpha": 0.7, "top_k": 8, "tail": "bucket", "chunk_tokens": 30}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"parallel": {"tensor": 2}},
    "tp2_sp_dense": {
        "parallel": {"tensor": 2, "sequence_parallel": True},
        "distill": {"dense": True, "alpha": 0.7},
    },
    # Three microbatches for two ranks: one round is not full.
    "pp2": {"parallel": {"pipeline": 2}, "batch": {"global_batch_size": 6}},
    "dp2_draws": {"distill": {"num_draws": 20, "alpha": 0.7}},
}


class Bench:
    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, write_tokens(folder)
        write_folder(folder / "huggingface", TEACHER, seed=fresh_seed(), scale=0.2)
        write_checkpoint(
            folder / "converted",
            open_huggingface(folder / "huggingface", vocab_size_multiple=8),
            tokenizer=None,
        )

    def config(self, name: str, teacher: dict[str, Any], **overrides: Any) -> RunConfig:
        content = {"distill": DISTILL, "train": {"steps": STEPS}, **overrides}
        return tiny(self.folder / name, self.data, teacher=teacher, **content)

    def pair(self, name: str, **overrides: Any) -> dict[str, RunConfig]:
        """Return one run with the converted teacher and with the Hugging Face folder."""
        converted = {"source": "online", "checkpoint": str(self.folder / "converted")}
        huggingface = {
            "source": "huggingface",
            "checkpoint": str(self.folder / "huggingface"),
            "shard_parameters": "none",
        }
        return {
            f"{name}_{side}": self.config(f"{name}_{side}", teacher, **overrides)
            for side, teacher in (("o", converted), ("h", huggingface))
        }


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("teachers"))


@pytest.fixture(scope="module")
def trained(bench: Bench) -> dict[str, list[TeacherRun]]:
    """Return what each rank saw of each run."""
    configs = {
        key: config
        for name, layout in LAYOUTS.items()
        for key, config in bench.pair(name, **layout).items()
    }
    by_rank = run_ranks(train_all, 2, list(configs.values()), STEPS)
    return {key: [rank[number] for rank in by_rank] for number, key in enumerate(configs)}


@pytest.mark.dist
@pytest.mark.parametrize("name", LAYOUTS)
def test_same_student_run(trained: dict[str, list[TeacherRun]], name: str) -> None:
    converted, huggingface = trained[f"{name}_o"][0], trained[f"{name}_h"][0]
    assert len(huggingface.records) == STEPS
    assert all(record["kd_loss"] > 1e-3 for record in huggingface.records)
    assert worst_loss(huggingface, converted) <= 1e-5


@pytest.mark.dist
@pytest.mark.parametrize("name", ["tp2", "pp2"])
def test_same_targets(trained: dict[str, list[TeacherRun]], name: str) -> None:
    samples = 0
    for converted, huggingface in zip(trained[f"{name}_o"], trained[f"{name}_h"], strict=True):
        assert converted.targets.keys() == huggingface.targets.keys() == huggingface.expected
        for sample, (ids, *values) in huggingface.targets.items():
            converted_ids, *converted_values = converted.targets[sample]
            for value, other in zip(values, converted_values, strict=True):
                torch.testing.assert_close(value, other, rtol=0, atol=1e-4)
            # Entries are sorted: only those as large as their neighbours may change order.
            gaps = -converted_values[0].diff(dim=-1)
            distinct = torch.ones_like(converted_ids, dtype=torch.bool)
            distinct[:, 1:] &= gaps > 1e-4
            distinct[:, :-1] &= gaps > 1e-4
            distinct[:, -1] = False
            assert torch.equal(ids[distinct], converted_ids[distinct])
            assert float(distinct.float().mean()) > 0.7
            samples += 1
    assert samples > 0


def targets_on_rank(rendezvous: str, folder: Path, zero3: bool, offload: bool) -> tuple[Any, float]:
    """Return targets at tensor-parallel size 2, and the share of the weights on this rank."""
    from megatron_kd.parallel.platform import start_platform

    platform = start_platform("cpu")
    from megatron_kd.config import ParallelSection
    from megatron_kd.data.batches import Microbatch
    from megatron_kd.parallel.groups import start_groups, stop_groups
    from megatron_kd.targets import TopSelection
    from megatron_kd.targets.sample_keys import sample_keys
    from megatron_kd.teacher.runtime.huggingface_teacher import (
        HuggingFaceSettings,
        HuggingFaceTeacher,
    )
    from megatron_kd.teacher.runtime.targets import SelectTargets

    groups = start_groups(
        platform, ParallelSection(tensor=2), timeout_seconds=120, rendezvous=rendezvous
    )
    settings = HuggingFaceSettings("fp32", VOCAB, rows=52, zero3=zero3, offload=offload)
    make_target = SelectTargets(TopSelection(8), groups, VOCAB, False, None)
    teacher = HuggingFaceTeacher(folder, groups, make_target, settings)
    tokens = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    batch = Microbatch(
        tokens,
        tokens,
        torch.ones(2, 24),
        torch.arange(24).expand(2, 24),
        torch.arange(2),
        sample_keys(tokens),
    )
    (target,) = teacher.targets([batch])
    local = sum(
        p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel()
        for p in teacher.model.parameters()
    )
    total = sum(getattr(p, "ds_numel", p.numel()) for p in teacher.model.parameters())
    stop_groups()
    return (target.indices, target.logprobs), local / total


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed (it is built from source)",
)
def test_zero3_spreads_the_weights(bench: Bench) -> None:
    (plain, plain_share), _ = run_ranks(
        targets_on_rank, 2, bench.folder / "huggingface", False, False
    )
    assert plain_share == 1.0
    for offload in (False, True):
        for sharded, share in run_ranks(
            targets_on_rank, 2, bench.folder / "huggingface", True, offload
        ):
            assert share < 0.55
            assert torch.equal(sharded[0], plain[0])
            assert float((sharded[1] - plain[1]).abs().max()) <= 1e-5


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda folder: folder.rename(folder.with_name("elsewhere")), "is not a folder"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "holds no .safetensors file",
    ),
    "other size": (
        lambda folder: _config(folder, vocab_size=VOCAB + 1),
        f"vocabulary of {VOCAB + 1} ids, this run has {VOCAB}",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_named_before_any_collective(tmp_path: Path, name: str) -> None:
    spoil, sentence = BAD[name]
    folder = write_folder(tmp_path / "huggingface", TEACHER)
    config = tiny(
        tmp_path / "run",
        write_tokens(tmp_path),
        teacher={"source": "huggingface", "checkpoint": str(folder)},
        distill=DISTILL,
    )
    assert check_inputs(config, world_size=1).teacher.folder == folder
    spoil(folder)
    with pytest.raises(ConfigError, match=sentence):
        check_inputs(config, world_size=1)


def test_the_vocabulary_is_proved_by_its_digest(tmp_path: Path) -> None:
    """Compare two tokenizers of one size: the teacher's must be the one of the data."""
    import sentencepiece

    def tokenizer(path: Path, text: str) -> Path:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text] * 5),
            model_prefix=str(path.with_suffix("")),
            vocab_size=60,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        return path

    letters = "abcdefghijklmnopqrstuvwxyz"
    matching = tokenizer(
        tmp_path / "matching.model", " ".join(letters[i:] + letters[:i] for i in range(26))
    )
    other = tokenizer(
        tmp_path / "other.model", " ".join(letters[i:] + letters[: i // 2] for i in range(26))
    )
    size = sentencepiece.SentencePieceProcessor(model_file=str(matching)).get_piece_size()
    folder = write_folder(
        tmp_path / "huggingface", TEACHER.model_copy(update={"vocab_size": size + 4})
    )
    tokens = write_tokens(tmp_path, vocab=size)

    def check(**teacher: Any) -> None:
        source = {"source": "huggingface", "checkpoint": str(folder), **teacher}
        config = tiny(
            tmp_path / "run", tokens, teacher=source, model={"vocab_size": size}, distill=DISTILL
        )
        check_inputs(
            config.model_copy(
                update={"data": config.data.model_copy(update={"tokenizer": matching})}
            ),
            world_size=1,
        )

    with pytest.raises(
        ConfigError, match="teacher.tokenizer: the teacher's ids cannot be compared"
    ):
        check()
    (folder / "tokenizer.model").write_bytes(matching.read_bytes())
    check()
    with pytest.raises(ConfigError, match="has another vocabulary than data.tokenizer"):
        check(tokenizer=str(other))
