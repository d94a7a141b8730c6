"""Token files for the sweeps of examples/: exactly so many tokens, the same ones every time; and the grids that read them."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
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
from tests.helpers.sweeps import tool
from tests.losses.cases import fresh_seed

SWEEPS = ("design_space", "weak_teachers")
BATCH, LENGTH = 16, 128


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_text", ROOT / "examples/text/prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(prefix: Path, lengths: list[int]) -> list[list[int]]:
    """Documents that say where they are from: id 10 * document + position, with what a token file's description holds."""
    documents = [
        [50 * number + place for place in range(length)] for number, length in enumerate(lengths)
    ]
    with TokenFileWriter(prefix, np.dtype("<u2")) as writer:
        writer.add(np.concatenate([np.array(each) for each in documents]), np.array(lengths))
        writer.commit(
            tokenizer_digest="d", vocab_size=5000, end_of_document=2, append_eod=True, bytes=99
        )
    return documents


def test_exactly_so_many_tokens(prepare: ModuleType, tmp_path: Path) -> None:
    lengths = np.random.default_rng(fresh_seed()).integers(1, 50, 40).tolist()
    documents, wanted = write(tmp_path / "all", lengths), sum(lengths) // 2
    for name in ("one", "two"):
        prepare.cut(tmp_path / "all", tmp_path / name, wanted)
    index = read_index(tmp_path / "one")
    assert (
        check_token_file(tmp_path / "one", vocab_size=5000, tokenizer_digest="d").num_tokens
        == wanted
    )
    assert (tmp_path / "one.bin").read_bytes() == (tmp_path / "two.bin").read_bytes()
    ids = np.fromfile(tmp_path / "one.bin", "<u2")
    pieces = np.split(ids, np.cumsum(index.lengths)[:-1])
    kept = [int(piece[0]) // 50 for piece in pieces]
    assert all(
        documents[number][: len(piece)] == piece.tolist()
        for number, piece in zip(kept, pieces, strict=True)
    )
    assert all(
        len(piece) == lengths[number] for number, piece in zip(kept[:-1], pieces, strict=False)
    ), "only the last one is cut"
    assert len(set(kept)) == len(kept), "none twice, and not in the order of their names"
    assert kept != sorted(kept), "none twice, and not in the order of their names"
    about = json.loads((tmp_path / "one.json").read_text())
    assert about["tokenizer_digest"] == "d", "the text of a cut document has no known length"
    assert "bytes" not in about, "the text of a cut document has no known length"
    with pytest.raises(
        ConfigError,
        match=rf"has {sum(lengths)} tokens .* fewer than --tokens {sum(lengths) + 1}: give more text",
    ):
        prepare.cut(tmp_path / "all", tmp_path / "more", sum(lengths) + 1)
    assert not list(tmp_path.glob("more*"))


def test_prose(prepare: ModuleType, tmp_path: Path) -> None:
    """Whole topics of the language reference; and documents that this repository has."""
    prepare.write_prose(tmp_path / "texts", 60_000)
    texts = {path.name: path.read_text() for path in (tmp_path / "texts").iterdir()}
    assert 60_000 <= sum(len(text.encode()) for text in texts.values()) < 300_000
    assert min(map(len, texts.values())) > 100
    assert "".join(texts.values()).count(" the ") > 300
    prepare.write_prose(tmp_path / "again", 60_000)
    assert {path.name for path in (tmp_path / "again").iterdir()} == set(texts)
    assert all(path.is_file() for path in prepare.own_documents())
    assert len(prepare.own_documents()) > 4


def test_bad_arguments(
    prepare: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert prepare.main([str(tmp_path), "--vocab-size", "500", "--tokens", "1"]) == 2
    assert capfd.readouterr().err == "prepare: error: --tokens (1) must be at least 2\n"


def test_passes_are_whole_and_shares_are_the_papers() -> None:
    """In variables, which cannot compute: steps of a pass, 10 % and 1 % of design_space, 5 % of weak_teachers, whole and small."""
    for name in SWEEPS:
        file = tomllib.loads((ROOT / f"examples/{name}/sweep.toml").read_text())
        for values in (file["variables"], file["variables"] | file["small"]):
            per_pass, rest = divmod(values["train_tokens"] - 1, BATCH * LENGTH)
            assert rest == 0
            if name == "design_space":
                assert values["teacher_steps"] % per_pass == 0
                assert values["early_last"] == per_pass - 1
                assert values["late_first"] == values["teacher_steps"] - per_pass
                assert (values["warmup"], values["decay"]) == (
                    values["steps"] // 10,
                    values["steps"] // 100,
                )
            else:
                assert values["short"] * 5 == values["steps"]
                assert values["warmup"] * 20 == values["steps"]
                assert values["long_warmup"] * 20 == values["long"]
                assert values["short_warmup"] * 20 == values["short"]


def test_cells_are_what_their_rows_say(tmp_path: Path) -> None:
    """PD* is pd_star.toml's loss; vanilla is a point of every grid; MSE, RS and full are not cut off; figures are the paper's."""
    sweep = resolve(ROOT / "examples/design_space/sweep.toml", tmp_path)
    configs: dict[str, Any] = {cell.name: cell.runs[1].steps[0].config for cell in sweep.cells}
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
        assert (configs[cell].optimizer.schedule, configs[cell].optimizer.decay_steps) == ("wsd", 5)
    vanilla = configs["NLL"].distill
    assert (vanilla.divergence, vanilla.alpha, vanilla.temperature) == (
        "soft_cross_entropy",
        1.0,
        1.0,
    )
    assert (vanilla.top_k, vanilla.top_p, vanilla.truncate, vanilla.temperature_on) == (
        100,
        0.95,
        "untempered",
        "teacher",
    )
    for key, name in (
        ("alpha", "alpha"),
        ("temperature", "temperature"),
        ("top_p", "p"),
        ("top_k", "k"),
    ):
        cells = [cell for cell in sweep.cells if cell.group == name]
        changed = [
            configs[cell.name].distill.model_copy(update={key: getattr(vanilla, key)})
            for cell in cells
        ]
        assert len(cells) >= 6, "one thing at a time"
        assert all(each == vanilla for each in changed), "one thing at a time"
    assert configs["MSE"].distill.dense
    assert configs["full"].distill.dense
    assert configs["RS-12"].distill.num_draws == 20
    assert {configs[name].teacher.source for name in ("LM", "LM XL", "0-alpha + WSD-LR")} == {
        "none"
    }
    figures = {cell.name: cell.paper.get("average") for cell in sweep.cells}
    assert (
        figures["alpha 0.9"],
        figures["temperature 5.0"],
        figures["k 50"],
        figures["p 0.6"],
    ) == (39.1, 37.7, 39.6, 38.3)
    assert (
        figures["LM XS"],
        figures["medium to XL"],
        figures["large to L"],
        figures["large to M"],
    ) == (32.6, 48.0, 42.9, 37.9)
    assert sum(figure is not None for figure in figures.values()) == len(figures) - 2 - 4, (
        "but for two mirrored rules and sparse"
    )


def commands(text: str) -> list[list[str]]:
    """Lines that start a program, lines that go on joined, comments and variables of the shell taken out."""
    lines = text.replace("\\\n", " ").splitlines()
    return [
        shlex.split(line, comments=True)
        for line in lines
        if line.startswith(("python ", "torchrun "))
    ]


def test_commands_of_the_pages(tmp_path: Path) -> None:
    """What the two pages say to type is understood; the paper's grids, with all their options, are sweeps."""
    spoken = 0
    for name in SWEEPS:
        page = (ROOT / f"examples/{name}/README.md").read_text()
        for words in commands(page):
            assert words[1] in ("tools/sweep.py", "tools/report.py")
            assert words[0] == "python"
            assert not words[2].endswith(".toml") or (ROOT / words[2]).is_file(), words[2]
            if "paper_scale.toml" in words[2]:
                code, told = tool(
                    "sweep", str(ROOT / words[2]), "--output", str(tmp_path), "--list", *words[5:]
                )
                assert code == 0, told
                assert told.count("open ") >= 29, told
            spoken += 1
    assert spoken == 8
    rows = [
        row.split("|")[2] for row in page.splitlines() if row.startswith("| ") and ("`--set" in row)
    ]
    options = [" ".join(re.findall(r"`([^`]+)`", row)) for row in rows]
    assert len(options) == 3
    assert all("the line above" in row for row in rows[1:])
    for number in range(3):
        given = shlex.split(" ".join(options[: number + 1]))
        settings = [word for word in given if word != "--set"]
        sweep = resolve(
            ROOT / "examples/weak_teachers/paper_scale.toml", tmp_path, settings=settings
        )
        jobs = [
            task.steps[0].config for name, task in sweep.tasks.items() if name.startswith("teacher")
        ]
        students = {cell.runs[43].steps[0].config.train.steps for cell in sweep.cells}
        assert students == {25000}
        assert {job.train.steps for job in jobs} == {150000 if number == 2 else 25000}
        assert len(jobs) == 4
        assert all(("qwen" in job.model.preset) == (number == 0) for job in jobs)


def test_commands_of_the_run_files() -> None:
    """The first lines of the files at the papers' sizes: their overrides make complete runs."""
    found = []
    for name in ("design_space/pd_star", "weak_teachers/recipe"):
        text = (ROOT / f"examples/{name}.toml").read_text()
        text = "\n".join(
            line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")
        )
        for words in commands(text):
            start = next(place for place, word in enumerate(words) if word == "--config") + 2
            rest = [word.replace("--output", "--run.directory") for word in words[start:]]
            found.append(load_config(["--config", str(ROOT / f"examples/{name}.toml"), *rest]))
    stored, star, teacher, student = found
    assert (stored.teacher.source, stored.distill.top_k, stored.distill.top_p) == (
        "huggingface",
        100,
        1.0,
    )
    assert (
        star.batch.global_batch_size * star.batch.sequence_length * star.train.steps
        == pytest.approx(100e9, rel=1e-4)
    )
    assert (teacher.teacher.source, teacher.train.steps, teacher.train.seed) == (
        "none",
        6 * student.train.steps,
        42,
    )
    assert student.teacher.checkpoint == teacher.run.directory
    assert student.optimizer.warmup_steps * 20 == student.train.steps
