"""Use the exported student in transformers and lm-evaluation-harness, and import it again."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_kd.data.tokenizer import load_tokenizer
from megatron_kd.models.huggingface.transformers_model import load_causal_lm, load_text_tokenizer
from tests.helpers.tools import Done, run_tools
from tests.inference.student import ROOT, Student
from tests.inference.use_ranks import NEW_TOKENS, PROMPTS

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

IN_TRANSFORMERS = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompts, new_tokens = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
for prompt in json.loads(prompts):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=int(new_tokens), do_sample=False, pad_token_id=0)
    out = out[0, ids.shape[1]:].tolist()
    out = out[:-1] if out[-1] == model.config.eos_token_id else out
    print(json.dumps({"ids": ids[0].tolist(), "tokens": out, "text": tokenizer.decode(out)}))
"""


def test_exported_student_is_the_same_in_transformers(
    student: Student, tool_calls: dict[str, Done]
) -> None:
    """Continue the prompts with the same greedy text as tools/generate.py."""
    export, generation = tool_calls["export"], tool_calls["generate"]
    assert export.code == 0, export
    assert "the same model" in export.out, export
    assert generation.code == 0, generation
    records = [json.loads(line) for line in generation.out.splitlines()]
    assert [record["text"] for record in records] == student.results.greedy["one"][:2]
    arguments = ["exported", json.dumps(PROMPTS[:2]), str(NEW_TOKENS)]
    done = subprocess.run(
        [sys.executable, "-c", IN_TRANSFORMERS, *arguments],
        capture_output=True,
        text=True,
        cwd=student.folder,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    huggingface = [json.loads(line) for line in done.stdout.splitlines()]
    processor = load_tokenizer(student.tokenizer)[0]
    assert [record["ids"] for record in huggingface] == [
        processor.encode(prompt) for prompt in PROMPTS[:2]
    ]
    assert [(record["tokens"], record["text"]) for record in huggingface] == [
        (record["tokens"], record["text"]) for record in records
    ]


def test_exported_student_is_imported_again(tool_calls: dict[str, Done]) -> None:
    assert tool_calls["import"].code == 0, tool_calls["import"]
    assert "hidden_size = 32" in tool_calls["import"].out, tool_calls["import"]
    perplexity = tool_calls["perplexity of the import"]
    assert "v  perplexity" in perplexity.out, perplexity


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_tasks_of_the_harness(
    student: Student, tool_calls: dict[str, Done], tmp_path: Path
) -> None:
    """Compare the harness's accuracy with the answers that the model finds most probable."""
    assert tool_calls["export"].code == 0
    greedy: Any = student.results.greedy["one"]
    items: list[dict[str, Any]] = [
        {"query": prompt, "choices": [f"{text}z", f"{text[:5]}q", "zqzqzq"], "gold": 1}
        for prompt, text in zip(PROMPTS, greedy, strict=False)
    ]
    items += [{**item, "choices": item["choices"][::-1], "gold": 0} for item in items]
    write_task(tmp_path, items)
    exported = student.folder / "exported"
    call = [
        "evaluate.py",
        "tasks",
        exported,
        "--task",
        "own.yaml",
        "--json",
        "scores.json",
        "--max-length",
        200,
    ]
    assert run_tools({"tasks": call}, cwd=tmp_path)["tasks"].code == 0
    result = json.loads((tmp_path / "scores.json").read_text())["results"]["piqa"]
    model = load_causal_lm(exported, torch.float32, setting="model")
    tokenizer = load_text_tokenizer(exported, setting="model")
    is_correct = []
    for item in items:
        scores = [
            log_likelihood(model, tokenizer, item["query"], choice) for choice in item["choices"]
        ]
        is_correct.append(scores.index(max(scores)) == item["gold"])
    assert result["items"] == len(items)
    assert abs(result["acc"] - sum(is_correct) / len(is_correct)) < 1e-9
    assert any(is_correct)


def write_task(folder: Path, items: list[dict[str, Any]]) -> None:
    """Write a task file like piqa.yaml, with the items as its data."""
    (folder / "own.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    task = (ROOT / "examples/evaluation/piqa.yaml").read_text().replace("piqa.jsonl", "own.jsonl")
    task = task.replace("{{query.strip()}}\\nAnswer:", "{{query}}").replace(
        'target_delimiter: " "', 'target_delimiter: ""'
    )
    (folder / "own.yaml").write_text(task)


def log_likelihood(model: Any, tokenizer: Any, context: str, answer: str) -> float:
    """Return log p(answer | context) as the harness defines it.

    Spaces at the end of a context belong to the answer. The ids of the answer are those that the
    whole text has after as many ids as the context alone has. Without a context, bos stands before.
    """
    context_ids, all_ids = (
        tokenizer(text, add_special_tokens=False).input_ids
        for text in (context.rstrip(), context + answer)
    )
    answer_ids = all_ids[len(context_ids) :]
    ids = [*(context_ids or [tokenizer.bos_token_id]), *answer_ids]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    positions = range(len(ids) - len(answer_ids), len(ids))
    return float(sum(logprobs[position - 1, ids[position]] for position in positions))
