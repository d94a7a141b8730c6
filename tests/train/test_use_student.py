"""A distilled student in use: continuations, perplexity, and the same model exported."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_kd.checkpoint.convert import open_huggingface, write_checkpoint
from megatron_kd.config import ConfigError, ModelSection, dump_toml
from megatron_kd.data.indexed import TokenFileWriter
from megatron_kd.data.tokenizer import load_tokenizer
from megatron_kd.models.transformers_model import load_causal_lm, load_text_tokenizer
from megatron_kd.train.harness import _start_id, read_task
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny
from tests.helpers.tools import Done, run_tools
from tests.losses.cases import fresh_seed
from tests.models.folders import write_folder
from tests.train.use_ranks import MEASURED, NEW_TOKENS, PROMPTS, Used, train_and_use

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
VOCAB = 400


class Student:
    """A folder with a tokenizer, token files and a student that was distilled at tensor-parallel size 2; and what ranks found."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "megatron_kd").rglob("*.py"))]
        self.tokenizer = self._train_tokenizer(texts)
        processor, info = load_tokenizer(self.tokenizer)
        encoded = [[*processor.encode(text), info.end_of_document] for text in texts]
        data, valid = (self._write(name, part, info.digest) for name, part in (("train", encoded[8:]), ("valid", encoded[:8])))
        teacher = ModelSection(hidden_size=32, num_layers=2, num_attention_heads=2, ffn_hidden_size=48, vocab_size=VOCAB)
        source = open_huggingface(write_folder(folder / "teacher_hf", teacher, seed=fresh_seed(), scale=0.1))
        write_checkpoint(folder / "teacher", source, tokenizer=info.digest)
        config = tiny(
            self.run,
            data,
            data={"train": [data], "valid": {"held_out": valid}, "tokenizer": str(self.tokenizer)},
            model={"vocab_size": VOCAB, "tied_embeddings": True, "init_std": 0.1},
            batch={"sequence_length": 48},
            train={"steps": 40, "evaluate_batches": MEASURED // 4},
            parallel={"tensor": 2},
            teacher={"source": "online", "checkpoint": str(folder / "teacher")},
            distill={"alpha": 0.1, "top_k": 16},
        )
        self.used: Used = run_ranks(train_and_use, 2, config, valid, str(self.tokenizer), timeout=300)[0]
        assert (self.run / "config.toml").read_text() == dump_toml(config)

    def _train_tokenizer(self, texts: list[str]) -> Path:
        corpus = self.folder / "corpus"
        corpus.mkdir()
        for index, text in enumerate(texts):
            (corpus / f"{index}.txt").write_text(text, encoding="utf-8")
        words = ["--input", str(corpus), "--vocab-size", str(VOCAB), "--output", str(self.folder / "tokenizer.model")]
        subprocess.run([sys.executable, str(ROOT / "tools/train_tokenizer.py"), *words], check=True, capture_output=True, timeout=100)
        return self.folder / "tokenizer.model"

    def _write(self, name: str, documents: list[list[int]], digest: str) -> str:
        prefix = self.folder / name
        with TokenFileWriter(prefix, np.dtype("<u2")) as writer:
            writer.add(np.concatenate(documents).astype("<u2"), np.array([len(each) for each in documents], dtype=np.int32))
            writer.commit(tokenizer_digest=digest, vocab_size=VOCAB)
        return str(prefix)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    return Student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def told(student: Student) -> dict[str, Done]:
    """Every call of a tool, in one process."""
    prompts = [word for prompt in PROMPTS[:2] for word in ("--prompt", prompt)]
    calls: dict[str, list[object]] = {
        "export": ["convert_checkpoint.py", "to-huggingface", "run", "--output", "exported", "--tokenizer", student.tokenizer, "--check"],
        "generate": ["generate.py", "run", *prompts, "--max-new-tokens", NEW_TOKENS, "--json"],
        "stop": ["generate.py", "run", "--prompt", PROMPTS[0], "--max-new-tokens", NEW_TOKENS, "--json", "--stop", _stop(student)],
        "perplexity": ["evaluate.py", "perplexity", "run", "--max-sequences", MEASURED, "--json", "out/found.json"],
        "import": ["convert_checkpoint.py", "from-huggingface", "exported", "--output", "imported", "--tokenizer", student.tokenizer],
        "perplexity of the import": ["evaluate.py", "perplexity", "imported", "--data", "v=valid", "--sequence-length", 48],
    }
    return run_tools({**calls, **{name: words for name, (words, _) in BAD.items()}}, cwd=student.folder)


def _stop(student: Student) -> str:
    """Text in the middle of the first greedy continuation, as a user would type it."""
    return json.dumps(student.used.greedy["one"][0][8:12])[1:-1]


def test_layouts_and_batches_write_the_same_text(student: Student) -> None:
    used = student.used
    assert used.greedy["one"] == used.greedy["tp2"] == used.greedy["pp2"]
    assert used.sampled["one"] == used.sampled["tp2"] == used.sampled["pp2"]
    assert used.alone == used.sampled["one"] != used.greedy["one"]
    assert all(0 < len(tokens) <= NEW_TOKENS for tokens in used.tokens)


def test_cache_changes_nothing(student: Student) -> None:
    assert student.used.tokens == student.used.uncached


def test_perplexity_is_the_runs_own_validation(student: Student) -> None:
    used = student.used
    for name, (cross_entropy, tokens) in used.perplexity.items():
        assert tokens == used.run["tokens"], name
        assert abs(cross_entropy - (used.run["ce_loss"] or 0.0)) <= 1e-5, name


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


def test_exported_student_is_the_same_in_transformers(student: Student, told: dict[str, Done]) -> None:
    """Exported with its tokenizer, it loads there and continues the prompts with the same greedy text as tools/generate.py."""
    assert told["export"].code == 0 and "the same model" in told["export"].out, told["export"]
    assert told["generate"].code == 0, told["generate"]
    rows = [json.loads(line) for line in told["generate"].out.splitlines()]
    assert [row["text"] for row in rows] == student.used.greedy["one"][:2]
    command = [sys.executable, "-c", IN_TRANSFORMERS, "exported", json.dumps(PROMPTS[:2]), str(NEW_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=student.folder, timeout=200)
    assert done.returncode == 0, done.stderr
    theirs = [json.loads(line) for line in done.stdout.splitlines()]
    processor = load_tokenizer(student.tokenizer)[0]
    assert [row["ids"] for row in theirs] == [processor.encode(prompt) for prompt in PROMPTS[:2]]
    assert [(row["tokens"], row["text"]) for row in theirs] == [(row["tokens"], row["text"]) for row in rows]


def test_stop_string(student: Student, told: dict[str, Done]) -> None:
    (row,) = (json.loads(line) for line in told["stop"].out.splitlines())
    whole = student.used.greedy["one"][0]
    assert row["finish"] == "stop" and row["text"] == whole[: whole.index(whole[8:12])]


def test_perplexity_tool_and_the_way_back(student: Student, told: dict[str, Done]) -> None:
    assert told["perplexity"].code == 0 and "held_out  perplexity" in told["perplexity"].out, told["perplexity"]
    found = json.loads((student.folder / "out/found.json").read_text())["results"]["held_out"]
    assert (found["cross_entropy"], found["tokens"]) == pytest.approx(student.used.perplexity["one"], abs=1e-6)
    assert told["import"].code == 0 and "hidden_size = 32" in told["import"].out, told["import"]
    assert "v  perplexity" in told["perplexity of the import"].out, told["perplexity of the import"]


BAD: dict[str, tuple[list[object], str]] = {
    "no checkpoint": (["generate.py", "nowhere", "--prompt", "x"], "no checkpoint at nowhere"),
    "no prompt": (["generate.py", "run"], "give at least one --prompt"),
    "temperature": (["generate.py", "run", "--prompt", "x", "--temperature", "-1"], "temperature (-1.0) must be >= 0"),
    "no number": (["generate.py", "run", "--prompt", "x", "--temperature", "nan"], "temperature (nan) must be >= 0 and finite"),
    "top_p": (["generate.py", "run", "--prompt", "x", "--top-p", "0"], "top_p (0.0) must be in (0, 1]"),
    "tensor": (["generate.py", "run", "--prompt", "x", "--tensor", "3"], "must be a multiple of --tensor (3)"),
    "ranks": (["generate.py", "run", "--prompt", "x", "--tensor", "2"], "1 processes cannot be split"),
    "other tokenizer": (["generate.py", "run", "--prompt", "x", "--tokenizer", "corpus/1.txt"], "is no tokenizer"),
    "no data": (["evaluate.py", "perplexity", "run", "--data", "x=absent"], "absent"),
    "data's form": (["evaluate.py", "perplexity", "run", "--data", "valid"], "--data valid must be NAME=PREFIX"),
    "long": (["evaluate.py", "perplexity", "run", "--sequence-length", "9000000"], "fewer than one sequence"),
    "output": (["convert_checkpoint.py", "to-huggingface", "run", "--output", "corpus"], "exists already"),
    "shards": (["convert_checkpoint.py", "to-huggingface", "run", "--output", "x", "--shard-gigabytes", "nan"], "(nan) must be > 0"),
    "positions": (["convert_checkpoint.py", "to-huggingface", "run", "--output", "x", "--max-positions", "0"], "(0) must be at least 1"),
    "no ranks": (["describe_model.py", "--preset", "qwen3-0.6b", "--ranks", "0"], "--ranks (0) must be at least 1"),
    "no positions": (["convert_checkpoint.py", "to-huggingface", "teacher", "--output", "x"], "--max-positions is needed"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(told: dict[str, Done], name: str) -> None:
    done = told[name]
    assert done.code == 2 and BAD[name][1] in done.err and len(done.err.splitlines()) == 1, done


def test_task_files(tmp_path: Path) -> None:
    """The examples are whole; a file that would bring data or code from elsewhere is refused."""
    for path in sorted((ROOT / "examples/evaluation").glob("*.yaml")):
        with pytest.raises(ConfigError, match="does not exist: name its folder"):
            read_task(path, tmp_path)
        name = next(line.split(": ")[1] for line in path.read_text().splitlines() if line.startswith("data_file"))
        (tmp_path / name).write_text("{}\n")
        task = read_task(path, tmp_path)
        assert task["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / name)
    piqa = (ROOT / "examples/evaluation/piqa.yaml").read_text()
    for text, sentence in (
        (piqa + "dataset_path: ybisk/piqa\n", "sets dataset_path"),
        (piqa + "process_docs: !function utils.run\n", "cannot be read"),
        (piqa.replace("task: piqa", ""), "lacks task"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=sentence):
            read_task(tmp_path / "bad.yaml", tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_tasks_of_the_harness(student: Student, told: dict[str, Done], tmp_path: Path) -> None:
    """The answer that the model itself finds likelier is the one that counts as given."""
    assert told["export"].code == 0
    greedy: Any = student.used.greedy["one"]
    asked = zip(PROMPTS, greedy, strict=False)
    items: list[dict[str, Any]] = [{"query": prompt, "choices": [text, text[:5], "zqzqzq"], "gold": 1} for prompt, text in asked]
    items += [{**item, "choices": item["choices"][::-1], "gold": 0} for item in items]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    task = (ROOT / "examples/evaluation/piqa.yaml").read_text().replace("piqa.jsonl", "own.jsonl")
    task = task.replace("{{query.strip()}}\\nAnswer:", "{{query}}").replace('target_delimiter: " "', 'target_delimiter: ""')
    (tmp_path / "own.yaml").write_text(task)
    words = ["evaluate.py", "tasks", student.folder / "exported", "--task", "own.yaml", "--json", "scores.json", "--max-length", 200]
    assert run_tools({"tasks": words}, cwd=tmp_path)["tasks"].code == 0
    found = json.loads((tmp_path / "scores.json").read_text())["results"]["piqa"]
    model, tokenizer = (
        load_causal_lm(student.folder / "exported", torch.float32, what="model"),
        load_text_tokenizer(student.folder / "exported", what="model"),
    )
    likeliest = [
        max(range(3), key=[likelihood(model, tokenizer, item["query"], choice) for choice in item["choices"]].__getitem__) for item in items
    ]
    right = [given == item["gold"] for given, item in zip(likeliest, items, strict=True)]
    assert found["items"] == len(items) and abs(found["acc"] - sum(right) / len(right)) < 1e-9 and any(right)


def likelihood(model: Any, tokenizer: Any, context: str, answer: str) -> float:
    """log p(answer | context); spaces at the end of a context belong to the answer, as the harness has it."""
    kept = context.rstrip()
    ids = tokenizer(context + answer, add_special_tokens=False).input_ids
    first = len(tokenizer(kept, add_special_tokens=False).input_ids)
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(sum(logprobs[place - 1, ids[place]] for place in range(first, len(ids))))


def test_texts_are_scored_after_a_known_id(tmp_path: Path) -> None:
    """The tokenizer's own ids come first; many a tokenizer.json names none, and config.json does."""

    class Ids:
        def __init__(self, bos: int | None, eos: int | list[int] | None) -> None:
            self.bos_token_id, self.eos_token_id = bos, eos

    class Model:
        def __init__(self, config: Ids) -> None:
            self.config = config

    for tokenizer, config, wanted in ((Ids(0, 1), Ids(2, 3), 0), (Ids(None, 1), Ids(2, 3), 1), (Ids(None, None), Ids(None, [4, 5]), 4)):
        assert _start_id(Model(config), tokenizer, tmp_path) == wanted
    with pytest.raises(ConfigError, match="names a bos or eos id"):
        _start_id(Model(Ids(None, None)), Ids(None, None), tmp_path)
