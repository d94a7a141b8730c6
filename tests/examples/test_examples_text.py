"""Test the token files of the example sweeps, their grids, and the commands of their pages."""

from __future__ import annotations

import importlib.util
import json
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from megatron_kd.config import ConfigError, load_config
from megatron_kd.data.preparation.token_file_writer import TokenFileWriter
from megatron_kd.data.token_file_checks import check_token_file
from megatron_kd.data.token_files import read_index
from megatron_kd.sweep.definition.grid import resolve
from tests.helpers.program import ROOT
from tests.losses.cases import fresh_seed

SWEEPS = ("design_space", "weak_teachers")
BATCH, LENGTH = 16, 128


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    """Return examples/text/prepare.py as a module."""
    spec = importlib.util.spec_from_file_location("prepare_text", ROOT / "examples/text/prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_documents(prefix: Path, lengths: list[int]) -> list[list[int]]:
    """Write and return documents whose ids are 50 * document + position, with a description."""
    documents = [
        [50 * number + position for position in range(length)]
        for number, length in enumerate(lengths)
    ]
    with TokenFileWriter(prefix, np.dtype("<u2")) as writer:
        writer.add(
            np.concatenate([np.array(document) for document in documents]), np.array(lengths)
        )
        writer.commit(
            tokenizer_digest="d", vocab_size=5000, end_of_document=2, append_eod=True, bytes=99
        )
    return documents


def test_exact_number_of_tokens(prepare: ModuleType, tmp_path: Path) -> None:
    lengths = np.random.default_rng(fresh_seed()).integers(1, 50, 40).tolist()
    documents, tokens = write_documents(tmp_path / "all", lengths), sum(lengths) // 2
    for name in ("one", "two"):
        prepare.cut(tmp_path / "all", tmp_path / name, tokens)
    index = read_index(tmp_path / "one")
    checked = check_token_file(tmp_path / "one", vocab_size=5000, tokenizer_digest="d")
    assert checked.num_tokens == tokens
    assert (tmp_path / "one.bin").read_bytes() == (tmp_path / "two.bin").read_bytes()
    ids = np.fromfile(tmp_path / "one.bin", "<u2")
    pieces = np.split(ids, np.cumsum(index.lengths)[:-1])
    order = [int(piece[0]) // 50 for piece in pieces]
    for number, piece in zip(order, pieces, strict=True):
        assert documents[number][: len(piece)] == piece.tolist()
    for number, piece in zip(order[:-1], pieces, strict=False):
        assert len(piece) == lengths[number], "only the last document may be cut"
    assert len(set(order)) == len(order), "a document occurs twice"
    assert order != sorted(order), "documents are in the order of their names"
    description = json.loads((tmp_path / "one.json").read_text())
    assert description["tokenizer_digest"] == "d"
    assert "bytes" not in description, "the text of a cut document has no known length"


def test_too_few_tokens(prepare: ModuleType, tmp_path: Path) -> None:
    write_documents(tmp_path / "all", [20, 30, 10])
    message = r"has 60 tokens .* fewer than --tokens 61: give more text"
    with pytest.raises(ConfigError, match=message):
        prepare.cut(tmp_path / "all", tmp_path / "more", 61)
    assert not list(tmp_path.glob("more*"))


def test_prose(prepare: ModuleType, tmp_path: Path) -> None:
    """Check that topics are complete, and the same ones at a second call."""
    prepare.write_prose(tmp_path / "texts", 60_000)
    texts = {path.name: path.read_text() for path in (tmp_path / "texts").iterdir()}
    assert 60_000 <= sum(len(text.encode()) for text in texts.values()) < 300_000
    assert min(map(len, texts.values())) > 100
    assert "".join(texts.values()).count(" the ") > 300
    prepare.write_prose(tmp_path / "again", 60_000)
    assert {path.name for path in (tmp_path / "again").iterdir()} == set(texts)


def test_repository_documents(prepare: ModuleType) -> None:
    assert all(path.is_file() for path in prepare.repository_documents())
    assert len(prepare.repository_documents()) > 4


def test_bad_arguments(
    prepare: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert prepare.main([str(tmp_path), "--vocab-size", "500", "--tokens", "1"]) == 2
    assert capfd.readouterr().err == "prepare: error: --tokens (1) must be at least 2\n"


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", SWEEPS)
def test_variables_agree(name: str, small: bool) -> None:
    """Check passes and shares by hand, since variables of a sweep cannot compute.

    A pass has whole steps. The shares are the papers': 10 % and 1 % of the steps in design_space,
    5 % in weak_teachers.
    """
    file = tomllib.loads((ROOT / f"examples/{name}/sweep.toml").read_text())
    values = file["variables"] | (file["small"] if small else {})
    steps_per_pass, remainder = divmod(values["train_tokens"] - 1, BATCH * LENGTH)
    assert remainder == 0
    if name == "design_space":
        assert values["teacher_steps"] % steps_per_pass == 0
        assert values["early_last"] == steps_per_pass - 1
        assert values["late_first"] == values["teacher_steps"] - steps_per_pass
        assert values["warmup"] == values["steps"] // 10
        assert values["decay"] == values["steps"] // 100
    else:
        assert values["short"] * 5 == values["steps"]
        assert values["warmup"] * 20 == values["steps"]
        assert values["long_warmup"] * 20 == values["long"]
        assert values["short_warmup"] * 20 == values["short"]


@pytest.fixture(scope="module")
def design_space(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the sweep of the design space."""
    return resolve(
        ROOT / "examples/design_space/sweep.toml", tmp_path_factory.mktemp("design_space")
    )


@pytest.fixture(scope="module")
def configs(design_space: Any) -> dict[str, Any]:
    """Return the configuration of each cell's run with seed 1."""
    return {cell.name: cell.runs[1].steps[0].config for cell in design_space.cells}


def test_recommended_cells(configs: dict[str, Any]) -> None:
    """Compare PD* with its run file, and learning-rate schedules with the paper's."""
    star = load_config(["--config", str(ROOT / "examples/design_space/pd_star.toml")])
    assert configs["PD* M"].distill == star.distill
    assert configs["WSD-alpha + WSD-LR"].distill != star.distill
    for cell in (
        "PD* M",
        "WSD-alpha + WSD-LR",
        "1-alpha + WSD-LR",
        "0-alpha + WSD-LR",
        "WSD-beta + WSD-LR",
    ):
        optimizer = configs[cell].optimizer
        assert (optimizer.schedule, optimizer.decay_steps) == ("wsd", 5)


def test_cells_change_one_setting_of_vanilla(design_space: Any, configs: dict[str, Any]) -> None:
    vanilla = configs["NLL"].distill
    assert vanilla.divergence == "soft_cross_entropy"
    assert (vanilla.alpha, vanilla.temperature) == (1.0, 1.0)
    assert (vanilla.top_k, vanilla.top_p) == (100, 0.95)
    assert (vanilla.truncate, vanilla.temperature_on) == ("untempered", "teacher")
    groups = {"alpha": "alpha", "temperature": "temperature", "top_p": "p", "top_k": "k"}
    for key, group in groups.items():
        cells = [cell for cell in design_space.cells if cell.group == group]
        assert len(cells) >= 6
        for cell in cells:
            distill = configs[cell.name].distill
            restored = distill.model_copy(update={key: getattr(vanilla, key)})
            assert restored == vanilla, cell.name


def test_targets_of_cells(configs: dict[str, Any]) -> None:
    """Check that MSE and full keep all ids, RS draws, and three cells have no teacher."""
    assert configs["MSE"].distill.dense
    assert configs["full"].distill.dense
    assert configs["RS-12"].distill.num_draws == 20
    for name in ("LM", "LM XL", "0-alpha + WSD-LR"):
        assert configs[name].teacher.source == "none"


def test_figures_of_the_paper(design_space: Any) -> None:
    figures = {cell.name: cell.paper.get("average") for cell in design_space.cells}
    expected = {
        "alpha 0.9": 39.1,
        "temperature 5.0": 37.7,
        "k 50": 39.6,
        "p 0.6": 38.3,
        "LM XS": 32.6,
        "medium to XL": 48.0,
        "large to L": 42.9,
        "large to M": 37.9,
    }
    assert {name: figures[name] for name in expected} == expected
    # Two mirrored rules and four cells of the group `sparse` have none.
    assert sum(figure is not None for figure in figures.values()) == len(figures) - 2 - 4
