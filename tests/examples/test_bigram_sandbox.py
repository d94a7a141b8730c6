"""The bigram sandbox: its chain, its teachers, its tabular learner and what is measured, by hand."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from megatron_kd.cache import CacheReader
from tests.losses.cases import fresh_seed

FOLDER = Path(__file__).parents[2] / "examples/bigram_sandbox"


@pytest.fixture(scope="module")
def sandbox() -> dict[str, ModuleType]:
    found = {}
    sys.path.insert(0, str(FOLDER))
    try:
        for name in ("chain", "prepare", "tabular", "measure"):
            spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
            assert spec is not None
            assert spec.loader is not None
            found[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found[name])
    finally:
        sys.path.remove(str(FOLDER))
    return found


def test_chain_and_sequences(sandbox: dict[str, ModuleType]) -> None:
    """Shares of what follows an id tend to its row; a trigger's output is the same all through a sequence, and never a trigger."""
    seed = fresh_seed()
    made = sandbox["chain"].make_chain(16, successors=4, triggers=4, noise=0.1, seed=seed)
    np.testing.assert_allclose(made.rows.sum(1), 1)
    assert [made.kind.count(kind) for kind in ("high", "low", "trigger")] == [6, 6, 4]
    tokens, outputs = sandbox["chain"].sample(made, 400, 100, seed=seed)
    assert not np.isin(outputs, made.triggers).any()
    truth = sandbox["chain"].next_ids(made, tokens, outputs)
    following = np.take_along_axis(truth[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    assert (following > 0).all(), "what follows was possible"
    after = np.isin(tokens[:, :-1], made.triggers)
    assert (following[after] == 1).all(), seed
    assert after.sum() > 50, seed
    row = next(number for number, kind in enumerate(made.kind) if kind == "high")
    share = (
        np.bincount(tokens[:, 1:][tokens[:, :-1] == row], minlength=16)
        / (tokens[:, :-1] == row).sum()
    )
    assert np.abs(share - made.rows[row]).max() < 6 * 0.5 / np.sqrt(
        (tokens[:, :-1] == row).sum()
    ), seed


def test_imperfect_teacher(sandbox: dict[str, ModuleType]) -> None:
    chain = sandbox["chain"]
    made = chain.make_chain(16, successors=4, triggers=2, noise=0.1, seed=3)
    tokens = np.arange(16)
    said = chain.imperfect(made.rows, tokens, wrong=0.3, ids=4, seed=1)
    np.testing.assert_allclose(said.sum(1), 1)
    np.testing.assert_allclose(0.5 * np.abs(said - made.rows).sum(1) <= 0.3 + 1e-12, True)
    assert (0.5 * np.abs(said - made.rows).sum(1)).mean() > 0.15
    with pytest.raises(ValueError, match="do not fit 16 ids"):
        chain.make_chain(16, successors=17, triggers=0, noise=0.0, seed=0)


def test_tabular_learner(sandbox: dict[str, ModuleType]) -> None:
    """A mixture of shares and teacher; rows never seen are uniform; routed rows have shares alone."""
    tabular = sandbox["tabular"]
    counts = np.array([[3, 1, 0], [0, 0, 0], [0, 0, 5]])
    teacher = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    found = tabular.learned(counts, teacher, 0.9, np.array([False, False, True]))
    np.testing.assert_allclose(
        found, [[0.1 * 0.75 + 0.45, 0.1 * 0.25 + 0.45, 0], [1 / 3] * 3, [0, 0, 1]]
    )
    assert tabular.errors(np.eye(3), teacher).tolist() == [0.5, 1.0, 1.0]
    rng = np.random.default_rng(fresh_seed())
    made = sandbox["chain"].make_chain(16, successors=8, triggers=0, noise=0.0, seed=1)
    assert tabular.draw(made, 1000, rng).sum() == 1000
    assert tabular.samples_needed(made, 0.0, 0.2, rng) > 2 * tabular.samples_needed(
        made, 1.0, 0.2, rng
    )


def test_measure(sandbox: dict[str, ModuleType]) -> None:
    """A student that says what the chain says has no error and copies; a uniform one has the errors of its rows."""
    chain, measure = sandbox["chain"], sandbox["measure"]
    made = chain.make_chain(16, successors=4, triggers=4, noise=0.1, seed=5)
    tokens, outputs = chain.sample(made, 20, 60, seed=2)
    truth = chain.next_ids(made, tokens, outputs)
    perfect = measure.measure(made, tokens, outputs, made.kind, truth, 7)
    assert (
        perfect["step"],
        perfect["high"],
        perfect["low"],
        perfect["copied"],
        perfect["probability_of_copy"],
    ) == (7, 0, 0, 1, 1)
    uniform = measure.measure(made, tokens, outputs, made.kind, np.full(truth.shape, 1 / 16), 7)
    assert uniform["high"] == pytest.approx(1 - 4 / 16)
    assert uniform["probability_of_copy"] == pytest.approx(1 / 16)
    points = [
        {"tokens": 10.0, "copied": 0.2, "high": 0.5},
        {"tokens": 20.0, "copied": 0.8, "high": 0.1},
    ]
    assert measure.reached(points, "copied", 0.5) == 15.0
    assert measure.reached(points, "high", 0.3) == 15.0
    assert measure.reached(points, "copied", 0.1) == 5.0
    assert measure.reached(points, "copied", 0.9) == 20.0


def test_prepared_data_and_teachers(tmp_path: Path) -> None:
    """Every sample of the token file has both teachers' distributions, with the trigger's output where it stands."""
    command = [
        sys.executable,
        str(FOLDER / "prepare.py"),
        str(tmp_path),
        "--sequences",
        "20",
        "--heldout",
        "4",
        "--length",
        "32",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    tokens = np.fromfile(tmp_path / "train.bin", dtype="<u2")
    assert len(tokens) == 21 * 32
    about = json.loads((tmp_path / "chain.json").read_text())
    exact, imperfect = (CacheReader(tmp_path / name) for name in ("exact", "imperfect"))
    sample = torch.from_numpy(tokens[:32].astype(np.int64))
    for reader, slots in ((exact, 8), (imperfect, 12)):
        target = reader.get(sample)
        assert target.indices.shape == (32, slots)
        torch.testing.assert_close(
            target.logprobs.exp().sum(-1)[:-1], torch.ones(31), rtol=1e-5, atol=1e-5
        )
    said = exact.get(sample)
    for place in range(31):
        if int(sample[place]) in about["triggers"]:
            assert said.indices[place, 0] == sample[place + 1]
            assert (said.indices[place, 1:] == -1).all()
        else:
            row = np.array(about["rows"][int(sample[place])])
            used = said.indices[place] >= 0
            np.testing.assert_allclose(
                said.logprobs[place][used].exp(), row[said.indices[place][used]], rtol=1e-5
            )
