"""Test the bigram sandbox: its chain, its teachers, its tabular learner and its measurements."""

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
    """Return the example's modules by name."""
    modules = {}
    sys.path.insert(0, str(FOLDER))
    try:
        for name in ("chain", "prepare", "tabular", "measure"):
            spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
            assert spec is not None
            assert spec.loader is not None
            modules[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(modules[name])
    finally:
        sys.path.remove(str(FOLDER))
    return modules


def test_chain_and_sequences(sandbox: dict[str, ModuleType]) -> None:
    """Compare shares of next ids with their row, and every trigger's next id with its output.

    An output stays the same in a sequence and is never a trigger.
    """
    seed = fresh_seed()
    chain = sandbox["chain"].make_chain(16, successors=4, triggers=4, noise=0.1, seed=seed)
    np.testing.assert_allclose(chain.rows.sum(1), 1)
    assert [chain.kinds.count(kind) for kind in ("high", "low", "trigger")] == [6, 6, 4]
    tokens, outputs = sandbox["chain"].sample_sequences(chain, 400, 100, seed=seed)
    assert not np.isin(outputs, chain.triggers).any()
    truth = sandbox["chain"].next_id_probabilities(chain, tokens, outputs)
    probability = np.take_along_axis(truth[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    assert (probability > 0).all(), "an impossible id followed"
    after_trigger = np.isin(tokens[:, :-1], chain.triggers)
    assert (probability[after_trigger] == 1).all(), seed
    assert after_trigger.sum() > 50, seed
    row = next(number for number, kind in enumerate(chain.kinds) if kind == "high")
    count = (tokens[:, :-1] == row).sum()
    share = np.bincount(tokens[:, 1:][tokens[:, :-1] == row], minlength=16) / count
    assert np.abs(share - chain.rows[row]).max() < 6 * 0.5 / np.sqrt(count), seed


def test_imperfect_teacher(sandbox: dict[str, ModuleType]) -> None:
    chain = sandbox["chain"].make_chain(16, successors=4, triggers=2, noise=0.1, seed=3)
    teacher = sandbox["chain"].add_wrong_ids(chain.rows, np.arange(16), wrong=0.3, ids=4, seed=1)
    np.testing.assert_allclose(teacher.sum(1), 1)
    distance = 0.5 * np.abs(teacher - chain.rows).sum(1)
    assert (distance <= 0.3 + 1e-12).all()
    assert distance.mean() > 0.15
    with pytest.raises(ValueError, match="do not fit 16 ids"):
        sandbox["chain"].make_chain(16, successors=17, triggers=0, noise=0.0, seed=0)


def test_tabular_learner(sandbox: dict[str, ModuleType]) -> None:
    """Compare the table with mixtures by hand; rows without samples are uniform."""
    tabular = sandbox["tabular"]
    counts = np.array([[3, 1, 0], [0, 0, 0], [0, 0, 5]])
    teacher = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    table = tabular.optimal_table(counts, teacher, 0.9, np.array([False, False, True]))
    # The last row is routed: it has the samples' shares alone.
    np.testing.assert_allclose(
        table, [[0.1 * 0.75 + 0.45, 0.1 * 0.25 + 0.45, 0], [1 / 3] * 3, [0, 0, 1]]
    )
    assert tabular.row_errors(np.eye(3), teacher).tolist() == [0.5, 1.0, 1.0]
    rng = np.random.default_rng(fresh_seed())
    chain = sandbox["chain"].make_chain(16, successors=8, triggers=0, noise=0.0, seed=1)
    assert tabular.draw_counts(chain, 1000, rng).sum() == 1000
    samples_alone = tabular.samples_needed(chain, 0.0, 0.2, rng)
    assert samples_alone > 2 * tabular.samples_needed(chain, 1.0, 0.2, rng)


def test_measure(sandbox: dict[str, ModuleType]) -> None:
    """Measure the chain's own probabilities, which have no error, and uniform ones."""
    measure = sandbox["measure"]
    chain = sandbox["chain"].make_chain(16, successors=4, triggers=4, noise=0.1, seed=5)
    tokens, outputs = sandbox["chain"].sample_sequences(chain, 20, 60, seed=2)
    truth = sandbox["chain"].next_id_probabilities(chain, tokens, outputs)
    perfect = measure.measure(chain, tokens, outputs, truth, 7)
    assert perfect == {
        "step": 7,
        "high": 0,
        "low": 0,
        "copied": 1,
        "probability_of_copy": 1,
    }
    uniform = measure.measure(chain, tokens, outputs, np.full(truth.shape, 1 / 16), 7)
    assert uniform["high"] == pytest.approx(1 - 4 / 16)
    assert uniform["probability_of_copy"] == pytest.approx(1 / 16)


def test_tokens_to_reach(sandbox: dict[str, ModuleType]) -> None:
    points = [
        {"tokens": 10.0, "copied": 0.2, "high": 0.5},
        {"tokens": 20.0, "copied": 0.8, "high": 0.1},
    ]
    tokens_to_reach = sandbox["measure"].tokens_to_reach
    assert tokens_to_reach(points, "copied", 0.5) == 15.0
    assert tokens_to_reach(points, "high", 0.3) == 15.0
    assert tokens_to_reach(points, "copied", 0.1) == 5.0
    assert tokens_to_reach(points, "copied", 0.9) == 20.0


def test_prepared_data_and_teachers(tmp_path: Path) -> None:
    """Read both teachers' distributions of a sample, with the outputs of its triggers."""
    sizes = ["--sequences", "20", "--heldout", "4", "--length", "32"]
    command = [sys.executable, str(FOLDER / "prepare.py"), str(tmp_path), *sizes]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    tokens = np.fromfile(tmp_path / "train.bin", dtype="<u2")
    assert len(tokens) == 21 * 32
    description = json.loads((tmp_path / "chain.json").read_text())
    exact, imperfect = (CacheReader(tmp_path / name) for name in ("exact", "imperfect"))
    sample = torch.from_numpy(tokens[:32].astype(np.int64))
    for reader, slots in ((exact, 8), (imperfect, 12)):
        target = reader.get(sample)
        assert target.indices.shape == (32, slots)
        torch.testing.assert_close(
            target.logprobs.exp().sum(-1)[:-1], torch.ones(31), rtol=1e-5, atol=1e-5
        )
    target = exact.get(sample)
    for position in range(31):
        indices = target.indices[position]
        if int(sample[position]) in description["triggers"]:
            assert indices[0] == sample[position + 1]
            assert (indices[1:] == -1).all()
        else:
            row = np.array(description["rows"][int(sample[position])])
            used = indices >= 0
            np.testing.assert_allclose(
                target.logprobs[position][used].exp(), row[indices[used]], rtol=1e-5
            )
