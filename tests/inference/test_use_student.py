"""A distilled student in use: continuations, perplexity, and the same model exported."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_kd.checkpoint.conversion.from_huggingface import open_huggingface, write_checkpoint
from megatron_kd.config import ModelSection, dump_toml
from megatron_kd.data.preparation.token_file_writer import TokenFileWriter
from megatron_kd.data.token_file_checks import check_token_file
from megatron_kd.data.token_files import read_index
from megatron_kd.data.tokenizer import load_tokenizer
from megatron_kd.models.huggingface.transformers_model import load_causal_lm, load_text_tokenizer
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny
from tests.helpers.tools import Done, run_tools
from tests.inference.use_ranks import MEASURED, NEW_TOKENS, PROMPTS, VOCAB, Used, train_and_use
from tests.losses.cases import fresh_seed
from tests.models.folders import write_folder

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]


class Student:
    """A folder with a tokenizer, token files and a student that was distilled at tensor-parallel size 2; and what ranks found."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        texts = [
            path.read_text(encoding="utf-8")
            for path in sorted((ROOT / "megatron_kd").rglob("*.py"))
        ]
        self.tokenizer = self._train_tokenizer(texts)
        processor, info = load_tokenizer(self.tokenizer)
        encoded = [[*processor.encode(text), info.end_of_document] for text in texts]
        data, valid = (
            self._write(name, part, info.digest)
            for name, part in (("train", encoded[8:]), ("valid", encoded[:8]))
        )
        teacher = ModelSection(
            hidden_size=48,
            num_layers=2,
            num_attention_heads=2,
            ffn_hidden_size=48,
            vocab_size=VOCAB,
        )
        source = open_huggingface(
            write_folder(folder / "teacher_hf", teacher, seed=fresh_seed(), scale=0.1)
        )
        write_checkpoint(folder / "teacher", source, tokenizer=info.digest)
        short = [
            ids[at : at + 60 + at % 97]
            for ids in encoded[:20]
            for at in range(0, min(len(ids), 400), 157)
        ]
        self._write("short", [*short[:5], [7], *short[5:]], info.digest)
        self._write("foreign", short, "0" * 64)
        config = tiny(
            self.run,
            data,
            data={"train": [data], "valid": {"held_out": valid}, "tokenizer": str(self.tokenizer)},
            model={"vocab_size": VOCAB, "tied_embeddings": True, "init_std": 0.1},
            batch={"sequence_length": 48},
            train={"steps": 40, "evaluate_batches": MEASURED // 4},
            parallel={"tensor": 2},
            teacher={"source": "online", "checkpoint": str(folder / "teacher")},
            # What trains along, a projection to the teacher's width, must not be met by anything below.
            distill={
                "alpha": 0.1,
                "top_k": 16,
                "hidden_states": [{"student_layer": 3, "teacher_layer": 1, "weight": 0.1}],
            },
        )
        self.used: Used = run_ranks(
            train_and_use, 2, config, valid, str(self.tokenizer), timeout=300
        )[0]
        assert (self.run / "config.toml").read_text() == dump_toml(config)

    def _train_tokenizer(self, texts: list[str]) -> Path:
        corpus = self.folder / "corpus"
        corpus.mkdir()
        for index, text in enumerate(texts):
            (corpus / f"{index}.txt").write_text(text, encoding="utf-8")
        words = [
            "--input",
            str(corpus),
            "--vocab-size",
            str(VOCAB),
            "--output",
            str(self.folder / "tokenizer.model"),
        ]
        subprocess.run(
            [sys.executable, str(ROOT / "tools/train_tokenizer.py"), *words],
            check=True,
            capture_output=True,
            timeout=100,
        )
        return self.folder / "tokenizer.model"

    def _write(self, name: str, documents: list[list[int]], digest: str) -> str:
        prefix = self.folder / name
        with TokenFileWriter(prefix, np.dtype("<u2")) as writer:
            writer.add(
                np.concatenate(documents).astype("<u2"),
                np.array([len(each) for each in documents], dtype=np.int32),
            )
            writer.commit(
                tokenizer_digest=digest, vocab_size=VOCAB, bytes=4 * sum(map(len, documents))
            )
        return str(prefix)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    return Student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def told(student: Student) -> dict[str, Done]:
    """Every call of a tool, in one process."""
    prompts = [word for prompt in PROMPTS[:2] for word in ("--prompt", prompt)]
    two = ["--data", "in=valid", "--data", "out=train"]
    calls: dict[str, list[object]] = {
        "export": [
            "convert_checkpoint.py",
            "to-huggingface",
            "run",
            "--output",
            "exported",
            "--tokenizer",
            student.tokenizer,
            "--check",
        ],
        "generate": ["generate.py", "run", *prompts, "--max-new-tokens", NEW_TOKENS, "--json"],
        "stop": [
            "generate.py",
            "run",
            "--prompt",
            PROMPTS[0],
            "--max-new-tokens",
            NEW_TOKENS,
            "--json",
            "--stop",
            _stop(student),
        ],
        "perplexity": [
            "evaluate.py",
            "perplexity",
            "run",
            "--max-sequences",
            MEASURED,
            "--json",
            "out/found.json",
        ],
        "import": [
            "convert_checkpoint.py",
            "from-huggingface",
            "exported",
            "--output",
            "imported",
            "--tokenizer",
            student.tokenizer,
        ],
        "beside a teacher": [
            "evaluate.py",
            "perplexity",
            "run",
            *two,
            "--teacher",
            "teacher",
            "--max-sequences",
            MEASURED,
            "--json",
            "b.json",
        ],
        "perplexity of the import": [
            "evaluate.py",
            "perplexity",
            "imported",
            "--data",
            "v=valid",
            "--sequence-length",
            48,
        ],
    }
    calls["score"] = [*SCORE, "--keep-fraction", "0.5", "--output", "chosen"]
    calls["score again"] = [
        *SCORE,
        "--keep-tokens",
        700,
        "--output",
        "fewer",
        "--scores",
        "chosen.scores",
    ]
    return run_tools(
        {**calls, **{name: words for name, (words, _) in BAD.items()}}, cwd=student.folder
    )


def _stop(student: Student) -> str:
    """Text in the middle of the first greedy continuation, as a user would type it."""
    return json.dumps(student.used.greedy["one"][0][8:12])[1:-1]


def test_layouts_and_batches_write_the_same_text(student: Student) -> None:
    used = student.used
    assert used.greedy["one"] == used.greedy["tp2"] == used.greedy["pp2"]
    assert used.sampled["one"] == used.sampled["tp2"] == used.sampled["pp2"]
    assert used.alone == used.sampled["one"] != used.greedy["one"]
    assert all(0 < len(tokens) <= NEW_TOKENS for tokens in used.tokens)


def test_prompts_of_ids(student: Student) -> None:
    """The same draws as for their texts, in every layout and batch; what cannot be continued is refused."""
    used = student.used
    assert used.of_ids == used.ids
    assert used.of_ids["one"] == used.of_ids["tp2"] == used.of_ids["pp2"]
    assert any(used.ids["one"])
    assert [
        part in told
        for part, told in zip(
            ("prompt 1 must", "prompt 1 must", "stop strings"), used.refused, strict=True
        )
    ] == [True] * 3


def test_cache_changes_nothing(student: Student) -> None:
    assert student.used.tokens == student.used.uncached


def test_perplexity_is_the_runs_own_validation(student: Student) -> None:
    used = student.used
    for name, (cross_entropy, tokens) in used.perplexity.items():
        assert tokens == used.run["tokens"], name
        assert abs(cross_entropy - (used.run["ce_loss"] or 0.0)) <= 1e-5, name


def test_calibration_and_teacher_are_those_of_whole_logits(student: Student) -> None:
    """In every layout, and to the last digit that fp32 has; a token whose confidence lies on a bin's edge may fall to either side."""
    used = student.used
    assert list(used.measured) == ["one", "one near", "tp2", "tp2 near", "pp2", "pp2 near"]
    for name, found in used.measured.items():
        near = name[3:]
        assert found["tokens"] == MEASURED * 48, name
        for key, value in used.plain[near].items():
            assert abs(found[key] - value) <= (1e-2 if key == "calibration_error" else 2e-5), (
                name,
                key,
                found[key],
                value,
            )
        for key, value in used.measured[f"one{near}"].items():
            if isinstance(value, float):
                assert abs(found[key] - value) <= (
                    1e-2 if "calibration" in key else 2e-5 * max(1.0, value)
                ), (name, key)
        assert found["bits_per_byte"] == pytest.approx(found["cross_entropy"] / math.log(2) / 4), (
            name
        )
    assert 0 < used.plain[""]["accuracy"] < 1
    assert used.plain[""]["teacher_kl"] > 0.01
    assert 0 < used.plain[" near"]["teacher_agreement"] < 1, "a test that can only say 0 or 1"


SCORE: list[object] = [
    "score_data.py",
    "--data",
    "short",
    "--teacher",
    "run",
    "--reference",
    "teacher",
    "--shard-tokens",
    500,
]


def test_scores_are_those_of_whole_logits(student: Student) -> None:
    """fp32 against fp32, in every layout."""
    plain = np.array(student.used.plain_scores)
    assert np.ptp(plain) > 0.05
    for name, scores in student.used.scores.items():
        assert scores.shape == plain.shape, name
        assert np.abs(scores - plain).max() < 2e-5, name


def documents(prefix: Path) -> list[bytes]:
    index = read_index(prefix)
    raw = Path(f"{prefix}.bin").read_bytes()
    return [
        raw[begin : begin + 2 * int(length)]
        for begin, length in zip(index.offsets.tolist(), index.lengths, strict=True)
    ]


def test_chosen_documents(student: Student, told: dict[str, Done]) -> None:
    """Half of them, unchanged and in order, none of which has a lower score than one left out; the second rule reads the same scores."""
    assert told["score"].code == 0, (
        told["score"],
        told["score again"],
    )
    assert told["score again"].code == 0, (
        told["score"],
        told["score again"],
    )
    whole, kept, fewer = (documents(student.folder / name) for name in ("short", "chosen", "fewer"))
    found = json.loads((student.folder / "chosen.selection.json").read_text())
    scored = len(whole) - found["not_scored"]
    assert found["not_scored"] == 1
    assert len(kept) == found["kept_documents"] == round(scored / 2)
    assert found["documents"] == len(whole)
    from_start = iter(enumerate(whole))
    chosen = [next(number for number, each in from_start if each == document) for document in kept]
    index = read_index(student.folder / "short")
    shards = [
        np.load(path) for path in sorted((student.folder / "chosen.scores").glob("shard-*.npy"))
    ]
    assert len(shards) > 2
    assert np.concatenate(shards, axis=1)[2].tolist() == (index.lengths - 1).tolist()
    sums = np.concatenate(shards, axis=1)
    scores = (sums[0] - sums[1]) / np.maximum(sums[2], 1)
    left_out = [
        number for number in range(len(whole)) if number not in chosen and len(whole[number]) > 2
    ]
    assert min(scores[chosen]) == pytest.approx(found["lowest_kept"])
    assert min(scores[chosen]) >= max(scores[left_out])
    check_token_file(
        student.folder / "chosen",
        vocab_size=VOCAB,
        tokenizer_digest=load_tokenizer(student.tokenizer)[1].digest,
    )
    assert set(fewer) <= set(kept) or set(kept) <= set(fewer)
    assert json.loads((student.folder / "fewer.selection.json").read_text())["kept_tokens"] <= 700
    assert sum(map(len, fewer)) // 2 > 500, "the budget is used"


def test_scoring_goes_on_where_it_stopped(student: Student, told: dict[str, Done]) -> None:
    """With a shard missing, and what a kill leaves of it, only that one is made again; the result is the same bytes."""
    assert told["score"].code == 0, told["score"]
    scores = student.folder / "chosen.scores"
    lost, *others = sorted(scores.glob("shard-*.npy"))
    before, content = {path: path.stat().st_mtime_ns for path in others}, lost.read_bytes()
    lost.unlink()
    (scores / f".{lost.name}.partial-1").write_bytes(content[:50])
    (student.folder / "again.bin").write_bytes(b"half")
    (student.folder / "again.selection.json").write_text("{}")
    again = [*SCORE, "--keep-fraction", "0.5", "--scores", "chosen.scores"]
    calls = {
        "again": [*again, "--output", "again"],
        "there": [*again, "--output", "chosen"],
        "other": [*again, "--output", "x", "--sequence-length", 16],
    }
    done = run_tools(calls, cwd=student.folder)
    assert done["again"].code == 0, done["again"]
    assert {path: path.stat().st_mtime_ns for path in others} == before
    assert lost.read_bytes() == content
    for ending in (".bin", ".idx"):
        assert (student.folder / f"again{ending}").read_bytes() == (
            student.folder / f"chosen{ending}"
        ).read_bytes()
    assert done["there"].code == 2
    assert "chosen.idx is there already" in done["there"].err
    assert done["other"].code == 2
    assert "has scores with another sequence_length (48 there, 16 here)" in done["other"].err


@pytest.mark.slow
def test_scoring_killed_in_the_middle(student: Student, told: dict[str, Done]) -> None:
    """SIGKILL after the first shards: they stay as they are, and the end is that of a run that was not killed."""
    assert told["score"].code == 0, told["score"]
    words = [
        *SCORE,
        "--keep-fraction",
        "0.5",
        "--output",
        "killed",
        "--batch-size",
        1,
        "--shard-tokens",
        100,
    ]
    command = [sys.executable, str(ROOT / "tools" / str(words[0])), *map(str, words[1:])]
    process = subprocess.Popen(
        command, cwd=student.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while len(list((student.folder / "killed.scores").glob("shard-*.npy"))) < 2:
        assert process.poll() is None, "it ended by itself"
    process.kill()
    process.wait()
    kept = {
        path: path.stat().st_mtime_ns
        for path in (student.folder / "killed.scores").glob("shard-*.npy")
    }
    assert not (student.folder / "killed.idx").exists()
    assert run_tools({"again": words}, cwd=student.folder)["again"].code == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert documents(student.folder / "killed") == documents(student.folder / "chosen")


IN_TRANSFORMERS = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
for prompt in json.loads(sys.argv[2]):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=int(sys.argv[3]), do_sample=False, pad_token_id=0)[0, ids.shape[1]:].tolist()
    out = out[:-1] if out[-1] == model.config.eos_token_id else out
    print(json.dumps({"ids": ids[0].tolist(), "tokens": out, "text": tokenizer.decode(out)}))
"""


def test_exported_student_is_the_same_in_transformers(
    student: Student, told: dict[str, Done]
) -> None:
    """Exported with its tokenizer, it loads there and continues the prompts with the same greedy text as tools/generate.py."""
    assert told["export"].code == 0, told["export"]
    assert "the same model" in told["export"].out, told["export"]
    assert told["generate"].code == 0, told["generate"]
    rows = [json.loads(line) for line in told["generate"].out.splitlines()]
    assert [row["text"] for row in rows] == student.used.greedy["one"][:2]
    command = [
        sys.executable,
        "-c",
        IN_TRANSFORMERS,
        "exported",
        json.dumps(PROMPTS[:2]),
        str(NEW_TOKENS),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=student.folder, timeout=200)
    assert done.returncode == 0, done.stderr
    theirs = [json.loads(line) for line in done.stdout.splitlines()]
    processor = load_tokenizer(student.tokenizer)[0]
    assert [row["ids"] for row in theirs] == [processor.encode(prompt) for prompt in PROMPTS[:2]]
    assert [(row["tokens"], row["text"]) for row in theirs] == [
        (row["tokens"], row["text"]) for row in rows
    ]


def test_stop_string(student: Student, told: dict[str, Done]) -> None:
    (row,) = (json.loads(line) for line in told["stop"].out.splitlines())
    whole = student.used.greedy["one"][0]
    assert row["finish"] == "stop"
    assert row["text"] == whole[: whole.index(whole[8:12])]


def test_perplexity_tool_and_the_way_back(student: Student, told: dict[str, Done]) -> None:
    assert told["perplexity"].code == 0, told["perplexity"]
    assert "held_out  perplexity" in told["perplexity"].out, told["perplexity"]
    found = json.loads((student.folder / "out/found.json").read_text())["results"]["held_out"]
    assert (found["cross_entropy"], found["tokens"]) == pytest.approx(
        student.used.perplexity["one"], abs=1e-6
    )
    assert told["beside a teacher"].code == 0, told["beside a teacher"]
    both = json.loads((student.folder / "b.json").read_text())["results"]
    assert set(both) == {"in", "out"}
    for key, value in student.used.measured["one"].items():
        assert both["in"][key] == (
            pytest.approx(value, abs=1e-5) if isinstance(value, float) else both["in"][key]
        ), key
    assert both["in"]["cross_entropy"] != both["out"]["cross_entropy"]
    assert both["out"]["teacher_kl"] > 0
    assert told["import"].code == 0, told["import"]
    assert "hidden_size = 32" in told["import"].out, told["import"]
    assert "v  perplexity" in told["perplexity of the import"].out, told["perplexity of the import"]


SCORE_BAD = SCORE[1:7]
BAD: dict[str, tuple[list[object], str]] = {
    "no checkpoint": (["generate.py", "nowhere", "--prompt", "x"], "no checkpoint at nowhere"),
    "no prompt": (["generate.py", "run"], "give at least one --prompt"),
    "temperature": (
        ["generate.py", "run", "--prompt", "x", "--temperature", "-1"],
        "temperature (-1.0) must be >= 0",
    ),
    "no number": (
        ["generate.py", "run", "--prompt", "x", "--temperature", "nan"],
        "temperature (nan) must be >= 0 and finite",
    ),
    "top_p": (
        ["generate.py", "run", "--prompt", "x", "--top-p", "0"],
        "top_p (0.0) must be in (0, 1]",
    ),
    "tensor": (
        ["generate.py", "run", "--prompt", "x", "--tensor", "3"],
        "must be a multiple of --tensor (3)",
    ),
    "ranks": (
        ["generate.py", "run", "--prompt", "x", "--tensor", "2"],
        "1 processes cannot be split",
    ),
    "other tokenizer": (
        ["generate.py", "run", "--prompt", "x", "--tokenizer", "corpus/1.txt"],
        "is no tokenizer",
    ),
    "no data": (["evaluate.py", "perplexity", "run", "--data", "x=absent"], "absent"),
    "no teacher": (
        ["evaluate.py", "perplexity", "run", "--teacher", "absent"],
        "--teacher: no checkpoint at absent",
    ),
    "data's form": (
        ["evaluate.py", "perplexity", "run", "--data", "valid"],
        "--data valid must be NAME=PREFIX",
    ),
    "long": (
        ["evaluate.py", "perplexity", "run", "--sequence-length", "9000000"],
        "fewer than one sequence",
    ),
    "nothing to keep": (
        ["score_data.py", *SCORE_BAD, "--output", "y"],
        "say what to keep with one of --keep-fraction",
    ),
    "too much": (
        ["score_data.py", *SCORE_BAD, "--output", "y", "--keep-fraction", "1.5"],
        "--keep-fraction (1.5) must be in (0, 1]",
    ),
    "none so high": (
        [*SCORE, "--output", "y", "--scores", "chosen.scores", "--threshold", "99"],
        "no document is kept by Rule",
    ),
    "foreign data": (
        [
            "score_data.py",
            "--data",
            "foreign",
            *SCORE_BAD[2:],
            "--output",
            "y",
            "--keep-fraction",
            "1",
        ],
        "trained with another tokenizer than foreign",
    ),
    "no reference": (
        [
            "score_data.py",
            "--data",
            "short",
            "--teacher",
            "run",
            "--reference",
            "z",
            "--output",
            "y",
            "--keep-tokens",
            "9",
        ],
        "--reference: no checkpoint at z",
    ),
    "output": (
        ["convert_checkpoint.py", "to-huggingface", "run", "--output", "corpus"],
        "exists already",
    ),
    "shards": (
        [
            "convert_checkpoint.py",
            "to-huggingface",
            "run",
            "--output",
            "x",
            "--shard-gigabytes",
            "nan",
        ],
        "(nan) must be > 0",
    ),
    "positions": (
        ["convert_checkpoint.py", "to-huggingface", "run", "--output", "x", "--max-positions", "0"],
        "(0) must be at least 1",
    ),
    "no ranks": (
        ["describe_model.py", "--preset", "qwen3-0.6b", "--ranks", "0"],
        "--ranks (0) must be at least 1",
    ),
    "no positions": (
        ["convert_checkpoint.py", "to-huggingface", "teacher", "--output", "x"],
        "--max-positions is needed",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(told: dict[str, Done], name: str) -> None:
    done = told[name]
    assert done.code == 2, done
    assert BAD[name][1] in done.err, done
    assert len(done.err.splitlines()) == 1, done


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_tasks_of_the_harness(student: Student, told: dict[str, Done], tmp_path: Path) -> None:
    """The answer that the model itself finds likelier is the one that counts as given."""
    assert told["export"].code == 0
    greedy: Any = student.used.greedy["one"]
    asked = zip(PROMPTS, greedy, strict=False)
    items: list[dict[str, Any]] = [
        {"query": prompt, "choices": [f"{text}z", f"{text[:5]}q", "zqzqzq"], "gold": 1}
        for prompt, text in asked
    ]
    items += [{**item, "choices": item["choices"][::-1], "gold": 0} for item in items]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    task = (ROOT / "examples/evaluation/piqa.yaml").read_text().replace("piqa.jsonl", "own.jsonl")
    task = task.replace("{{query.strip()}}\\nAnswer:", "{{query}}").replace(
        'target_delimiter: " "', 'target_delimiter: ""'
    )
    (tmp_path / "own.yaml").write_text(task)
    words = [
        "evaluate.py",
        "tasks",
        student.folder / "exported",
        "--task",
        "own.yaml",
        "--json",
        "scores.json",
        "--max-length",
        200,
    ]
    assert run_tools({"tasks": words}, cwd=tmp_path)["tasks"].code == 0
    found = json.loads((tmp_path / "scores.json").read_text())["results"]["piqa"]
    model, tokenizer = (
        load_causal_lm(student.folder / "exported", torch.float32, what="model"),
        load_text_tokenizer(student.folder / "exported", what="model"),
    )
    likeliest = [
        max(
            range(3),
            key=[
                likelihood(model, tokenizer, item["query"], choice) for choice in item["choices"]
            ].__getitem__,
        )
        for item in items
    ]
    right = [given == item["gold"] for given, item in zip(likeliest, items, strict=True)]
    assert found["items"] == len(items)
    assert abs(found["acc"] - sum(right) / len(right)) < 1e-9
    assert any(right)


def likelihood(model: Any, tokenizer: Any, context: str, answer: str) -> float:
    """log p(answer | context) as the harness has it: spaces at the end of a context belong to the answer, whose ids are those that the
    whole text has after as many as the context alone has; without a context, bos stands before."""
    kept, whole = (
        tokenizer(text, add_special_tokens=False).input_ids
        for text in (context.rstrip(), context + answer)
    )
    answered = whole[len(kept) :]
    ids = [*(kept or [tokenizer.bos_token_id]), *answered]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(
        sum(logprobs[place - 1, ids[place]] for place in range(len(ids) - len(answered), len(ids)))
    )
