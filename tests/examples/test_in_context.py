"""The in-context example: its language, its token files, and its probes' arithmetic on models whose answers are known."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from itertools import permutations
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from megatron_kd.config import ConfigError, ModelSection, load_config
from megatron_kd.data.dataset import DatasetRequest, build_dataset
from megatron_kd.data.token_files import read_index
from megatron_kd.planning.memory import peak_rank, run_memory
from megatron_kd.planning.planned_run import PlannedRun
from megatron_kd.sweep.definition.grid import resolve
from tests.helpers.sweeps import sweep
from tests.losses.cases import fresh_seed

ROOT = Path(__file__).parents[2]
HERE = ROOT / "examples/in_context"


def load(name: str) -> ModuleType:
    """A file of the example; prepare.py and probe.py find language.py themselves."""
    if name == "language" and name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(
        name if name == "language" else f"in_context_{name}", HERE / f"{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


language, prepare, probe = load("language"), load("prepare"), load("probe")
WORDS, IDS = language.WORDS, language.IDS
CLEAN = language.Noise(0.0, 0.0)


@pytest.fixture
def rng() -> Any:
    return np.random.default_rng(fresh_seed())


def test_words_are_those_of_the_run_file() -> None:
    assert (
        len(set(WORDS))
        == len(WORDS)
        == load_config(["--config", str(HERE / "student.toml")]).model.vocab_size
    )


def test_copies_come_again_at_their_distance(rng: Any) -> None:
    for _ in range(200):
        made = language.copy(rng)
        again = made.words[made.start :]
        assert made.words[made.start - 1] == "<again>"
        assert len(set(again)) == len(again) >= 4
        first = made.start - made.distance
        assert made.words[first : first + len(again)] == again
        assert made.words[0] == "<copy>"
    made = language.copy(rng, length=5, gap=7)
    assert made.distance == 13
    assert len(made.words) == 1 + 5 + 7 + 1 + 5


def test_needles_have_one_answer(rng: Any) -> None:
    for depth in (None, 0.0, 0.5, 1.0):
        for _ in range(50):
            made = language.needle(rng, depth=depth)
            body = made.body[1:]
            pairs = {
                word: body[place + 1] for place, word in enumerate(body) if word in language.KEYS
            }
            assert sum(word in language.KEYS for word in body) == len(pairs), "a key stands twice"
            assert len(body) == made.context
            assert made.prompt == [
                *made.body,
                "?",
                made.answers[0][0],
                ":",
            ]
            asked = [
                made.words[len(made.body) + 4 * number + 1] for number in range(len(made.answers))
            ]
            assert [(key, pairs[key]) for key in asked] == made.answers
            assert len(set(asked)) == len(asked)
            # Its place among what may be before it and after it.
            place = body.index(made.answers[0][0])
            if depth is not None:
                assert abs(place / (len(body) - 2) - depth) < 0.35
                assert depth != 0.0 or place == 0
                assert depth != 1.0 or place == len(body) - 2


def told(prompt: list[str]) -> int:
    """The answer, read from the text alone."""
    asked, total = prompt[-2], 0
    for place in range(1, len(prompt) - 3, 4):
        _, verb, amount, thing = prompt[place : place + 4]
        total += {"finds": 1, "loses": -1}[verb] * int(amount) * (thing == asked)
    return total


def test_solutions_of_sums(rng: Any) -> None:
    """Right ones end in what the text says, in any possible order; each step is an equation; different orders occur."""
    seen: Counter[tuple[str, ...]] = Counter()
    for _ in range(300):
        asked = language.problem(rng)
        solved = language.solution(rng, asked, CLEAN)
        assert told(asked.prompt) == sum(asked.terms) == int(solved[-1])
        assert language.verify(asked.terms, solved)
        for place in range(0, len(solved) - 2, 6):
            left, sign, right, _, result, _ = solved[place : place + 6]
            assert int(left) + (int(right) if sign == "+" else -int(right)) == int(result) >= 0
    asked = language.Problem(
        (("p0", 5, "t0"), ("p1", 9, "t1"), ("p2", -3, "t0"), ("p3", 4, "t0")), "t0"
    )
    assert set(language.orders(asked.terms)) == {
        order for order in permutations((5, -3, 4)) if order[0] > 0
    }
    for _ in range(100):
        seen[tuple(language.solution(rng, asked, CLEAN))] += 1
    assert len(seen) == 4
    assert all(language.verify(asked.terms, words) for words in seen)


def test_shares_of_bad_solutions(rng: Any) -> None:
    noise, found = language.Noise(0.3, 0.2), Counter[str]()
    for _ in range(2000):
        asked = language.problem(rng)
        solved = language.solution(rng, asked, noise)
        kind = (
            "incomplete"
            if "answer" not in solved
            else "wrong"
            if not language.verify(asked.terms, solved)
            else "right"
        )
        found[kind] += 1
    for kind, share in (("wrong", 0.3), ("incomplete", 0.2), ("right", 0.5)):
        assert abs(found[kind] / 2000 - share) < 0.06, (kind, found)
    with pytest.raises(ValueError, match="together at most 1"):
        language.Noise(0.7, 0.4)


@pytest.mark.parametrize(
    ("words", "right"),
    [
        ("5 + 4 = 9 ; 9 - 3 = 6 ; answer 6", True),
        ("4 - 3 = 1 ; 1 + 5 = 6 ; answer 6", True),
        ("answer 6", False),
        ("5 + 4 = 9 ; answer 6", False),
        ("5 + 4 = 8 ; 8 - 3 = 6 ; answer 6", False),
        ("5 + 4 = 9 ; 9 - 3 = 6 ; answer 5", False),
        ("5 + 4 = 9 ; 9 - 3 = 6 ; answer", False),
        ("5 + 4 = 9 ; 9 - 3 = 6 ; answer 6 answer 6", False),
        ("5 + 5 = 10 ; 10 - 4 = 6 ; answer 6", False),
        ("5 + 1 = 6 ; answer 6", False),
        ("", False),
    ],
)
def test_verifier(words: str, right: bool) -> None:
    assert language.verify([5, -3, 4], words.split()) is right


def test_token_files(tmp_path: Path) -> None:
    """Whole documents in every sample that a run reads, the same files for the same seed, no held-out sum, other data in `more`."""
    seed = str(fresh_seed())
    for folder in ("one", "two"):
        words = [
            str(tmp_path / folder),
            "--sequences",
            "60",
            "--heldout",
            "3",
            "--problems",
            "40",
            "--each",
            "2",
            "--seed",
            seed,
        ]
        assert prepare.main(words) == 0
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 5 * 3 + 1
    assert all(
        (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        for name in names
    )
    probes = json.loads((tmp_path / "one/probes.json").read_text())
    withheld = {tuple(sorted(each["terms"])) for each in probes["sum"]}
    blocks = {}
    for name in ("train", "more", "heldout_copy", "heldout_needle", "heldout_sum"):
        prefix = str(tmp_path / "one" / name)
        assert set(read_index(prefix).lengths) == {128}
        data = build_dataset(
            DatasetRequest(
                prefixes=[prefix],
                num_samples=60,
                sequence_length=128,
                seed=3,
                index_cache=tmp_path / "cache",
                end_of_document=None,
                vocab_size=len(WORDS),
                repeat=name in ("train", "more"),
            )
        )
        assert len(data) == (60 if name in ("train", "more") else 3)
        blocks[name] = {tuple(data[place]["tokens"].tolist()) for place in range(len(data))}
    assert not blocks["train"] & blocks["more"]
    assert len(blocks["train"]) == 60
    kinds: Counter[str] = Counter()
    for block in (*blocks["train"], *blocks["more"]):
        for document in documents(block):
            kinds[document[0]] += 1
            terms = terms_of(document)
            assert document[0] in ("<copy>", "<find>", "<sum>"), document
            assert tuple(sorted(terms)) not in withheld, document
    assert min(kinds.values()) > 0.2 * sum(kinds.values()), kinds
    for kind in ("copy", "needle", "sum"):
        (only,) = {
            document[0] for block in blocks[f"heldout_{kind}"] for document in documents(block)
        }
        assert only == {"copy": "<copy>", "needle": "<find>", "sum": "<sum>"}[kind]


def documents(block: tuple[int, ...]) -> list[list[str]]:
    """Words of each document of a sample, without ends; a sample ends with an end."""
    assert block[-1] == IDS["<end>"]
    text = " ".join(WORDS[each] for each in block)
    return [part.split() for part in text.split("<end>") if part.split()]


def terms_of(document: list[str]) -> list[int]:
    if document[0] != "<sum>":
        return []
    prompt = document[: document.index(":") + 1]
    found = []
    for place in range(1, len(prompt) - 3, 4):
        _, verb, amount, thing = prompt[place : place + 4]
        found += [int(amount) * (1 if verb == "finds" else -1)] if thing == prompt[-2] else []
    return found


def test_blocks_are_full(rng: Any) -> None:
    made = list(language.blocks(rng, list(language.makers(CLEAN, frozenset()).values()), 500, 128))
    assert {len(block) for block in made} == {128}
    # An end closes the last document, further ones fill the block.
    free = [block[::-1].index(next(each for each in block[::-1] if each)) - 1 for block in made]
    assert all(
        block.index(IDS["<end>"]) + 1 > room for room, block in zip(free, made[1:], strict=False)
    ), "the oldest one had fitted"
    # 4.9 +- 0.5 over seeds; 16 where only two documents are looked at.
    assert np.mean(free) < 8
    with pytest.raises(ValueError, match="make blocks longer"):
        list(language.blocks(rng, list(language.makers(CLEAN, frozenset()).values()), 100, 30))


def test_copy_and_needle_probes() -> None:
    """A model that repeats what followed the same id before copies everything, and finds the values; one that cannot look far does not."""
    probes, _ = prepare.draw_probes(np.random.default_rng(fresh_seed()), 2, 3)

    def induction(reach: int) -> Any:
        def likeliest(tokens: torch.Tensor) -> torch.Tensor:
            out = torch.zeros_like(tokens)
            for row, ids in enumerate(tokens.tolist()):
                for place, id_ in enumerate(ids):
                    key = ids[1] if id_ == IDS["<again>"] else None
                    asked = ids[place - 1] if id_ == IDS[":"] else id_
                    before = [
                        at for at in range(max(0, place - reach), place - 1) if ids[at] == asked
                    ]
                    if place and ids[place - 1] == IDS["?"]:
                        key = IDS[":"]  # only after the colon a value is due
                    out[row, place] = (
                        key if key is not None else ids[before[-1] + 1] if before else IDS["answer"]
                    )
            return out

        return likeliest

    copied, found = (
        probe.copying(probes["copy"], induction(1000)),
        probe.finding(probes["needle"], induction(1000)),
    )
    assert copied["accuracy"] == found["accuracy"] == 1.0
    assert [row["distance"] for row in copied["by_distance"]] == [9 + gap for gap in prepare.GAPS]
    assert {row["count"] for row in copied["by_distance"]} == {3 * 8}
    assert {row["count"] for row in found["by_depth"]} == {3 * 4}
    copied, found = (
        probe.copying(probes["copy"], induction(20)),
        probe.finding(probes["needle"], induction(30)),
    )
    # <again> is followed by the first id whatever the reach; all else is too far away in the last two.
    assert [round(row["accuracy"], 3) for row in copied["by_distance"]] == [
        1.0,
        1.0,
        0.125,
        0.125,
        0.125,
    ]
    assert found["by_depth"][-1]["accuracy"] == 1.0
    assert found["by_depth"][0]["accuracy"] == 0.25
    assert [row["accuracy"] for row in found["by_context"]][0] == 1.0
    assert found["by_context"][-1]["accuracy"] < 0.5


def test_sum_probe() -> None:
    """Samples that are right in a known share of places: counts, estimator, best, and different solutions."""
    terms = [[5, -3, 4], [2, 3], [9, 1]]
    probes = [{"prompt": [number], "terms": each} for number, each in enumerate(terms)]
    ways = [sorted(language.right_solutions(each)) for each in terms]
    asked: list[float] = []

    def sample(prompts: Any, temperature: float) -> list[list[int]]:
        asked.append(temperature)
        assert [prompt[0] for prompt in prompts] == [0] * 20 + [1] * 20 + [2] * 20
        found = []
        for place, (number,) in enumerate(prompts):
            right = {0: place % 4 == 0, 1: place % 2 == 0, 2: False}[number] and temperature < 0.7
            # The first problem is always worked out in one way, the second in both.
            words = ways[number][place // 2 % 2 if number else 0]
            found.append(language.encode(words if right else words[-2:]))
        return found

    found = probe.adding(probes, sample, 20)
    assert asked == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert found["problems"] == 3
    first = found["points"][0]
    by_hand = [(5 / 20 + 10 / 20 + 0) / 3, 1 - 0]
    assert first["pass_1"] == pytest.approx(by_hand[0])
    assert first["pass"][19] == pytest.approx(2 / 3)
    assert len(first["pass"]) == 20
    assert first["pass_16"] == first["pass"][15]
    assert first["pass"] == sorted(first["pass"])
    # The first problem's are alike, the second's with steps and without.
    assert first["solutions"] == pytest.approx((1 + 2 + 0) / 3)
    assert found["points"][4]["pass_16"] == 0.0
    assert found["best_pass_16"] == first["pass_16"]
    assert found["best_pass_1"] == first["pass_1"]


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="write it with prepare.py"):
        probe.read_probes(tmp_path / "probes.json")
    (tmp_path / "probes.json").write_text(json.dumps({"words": ["other"]}))
    with pytest.raises(ConfigError, match="another version of language.py"):
        probe.read_probes(tmp_path / "probes.json")
    for words, sentence in (
        (["--length", "20"], "the longest document"),
        (["--wrong", "0.9", "--incomplete", "0.2"], "at most 1"),
    ):
        with pytest.raises(SystemExit) as left:
            prepare.main([str(tmp_path / "out"), *words])
        assert left.value.code == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_sweep_sees_each_token_once(tmp_path: Path) -> None:
    """All students but SPT-2x pass once over `train`; that one once over `train` and `more`; the routed shares are the paper's."""
    for small in (False, True):
        sweep = resolve(HERE / "sweep.toml", tmp_path, small=small)
        samples = int(sweep.variables["sequences"])
        for cell in sweep.cells:
            config = sweep.tasks[f"{cell.name}, seed {sweep.seeds[0]}"].steps[0].config
            assert config is not None
            twice = 1 + (cell.name == "SPT-2x")
            assert config.train.steps * config.batch.global_batch_size == twice * samples
            assert len(config.data.train) == twice
            assert (config.teacher.source == "cached") == cell.name.startswith("DPT")
        if not small:
            routed = [cell.values["routed"] for cell in sweep.cells if "routed" in cell.values]
            assert routed == [0.0, 0.0, 0.15, 0.3]
            assert len(sweep.cells) == 6
            assert len(sweep.seeds) == 3


def test_commands_of_the_page(tmp_path: Path) -> None:
    """What examples/README.md tells a reader to type, up to the point where something would be trained."""
    page = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    (block,) = [
        block
        for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
        if "in_context" in block
    ]
    small, whole, report = [shlex.split(line, comments=True)[1:] for line in block.splitlines()]
    assert whole[:2] == small[:2] == ["tools/sweep.py", "examples/in_context/sweep.toml"]
    assert report[0] == "tools/report.py"
    for words, tasks in ((small, 4 + 6 * 3), (whole, 4 + 6 * 3)):
        code, told = sweep(ROOT / words[1], tmp_path, *words[4:], "--list")
        assert code == 0, told
        assert told.count("open ") == tasks, told
    assert report[1] == whole[3]
    assert report[2] == "--html"
    assert whole[3] != small[3]


def test_paper_sizes() -> None:
    """A trillion tokens for both, in devices of 80 GB, on the 128 that the scripts ask for."""
    for name, teacher in (("dpt_1b", ModelSection(preset="llama-3.1-8b")), ("teacher_8b", None)):
        config = load_config(["--config", str(HERE / f"{name}.toml")])
        assert (
            config.train.steps * config.batch.global_batch_size * config.batch.sequence_length
            == pytest.approx(1e12, rel=1e-5)
        )
        assert config.num_microbatches(128) > 0
        assert teacher is None or config.teacher_problem(teacher, 128) is None
        assert (
            5 * 2**30
            < peak_rank(run_memory(PlannedRun(config, 128256, teacher), 128)).total
            < 70 * 2**30
        )
        script = (HERE / f"{name}.sbatch").read_text()
        assert "--nodes=16" in script
        assert "--ntasks-per-node=8" in script
        assert f"train examples/in_context/{name}.toml" in script
        subprocess.run(["bash", "-n", str(HERE / f"{name}.sbatch")], check=True, timeout=20)
    routing = load_config(["--config", str(HERE / "dpt_1b.toml")]).distill.routing
    assert (routing.fraction, routing.scope) == (0.15, "batch")
