"""Run every command that README.md and docs/ show, in the order a reader would, at toy size."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.families import make_model

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# Commands whose effect other tests check at more length; the value names the test's file.
ELSEWHERE = {
    "python -m venv .venv": "tests/run.sh",
    "python3 -m venv .venv && . .venv/bin/activate": "tests/run.sh",
    ".venv/bin/python -m pip install -c constraints.txt -e "
    "'.[huggingface,preprocess,report]'": "tests/run.sh",
    "pip install -c constraints.txt -e '.[huggingface,preprocess,report]'": "tests/run.sh",
    "bash examples/quickstart.sh": "tests/docs/test_documents.py",
    "sbatch examples/slurm/student_7b.sbatch": "tests/operations/test_slurm_cluster.py",
    "bash examples/slurm/student_7b.sbatch --dry-run": "tests/operations/test_slurm_cluster.py",
    "bash examples/slurm/two_phase.sh --dry-run": "tests/operations/test_slurm_cluster.py",
    "bash examples/slurm/chain.sh 10 examples/slurm/student_7b.sbatch": (
        "tests/operations/test_slurm_cluster.py"
    ),
    "python tools/evaluate.py tasks exported --task examples/evaluation/piqa.yaml "
    "--data-folder eval/": "tests/inference/test_lm_eval.py",
}
# Sizes for a test in place of a reader's.
TOY = {
    "--vocab-size 32000": "--vocab-size 700",
    "valid=0.01": "valid=0.2",
    "--nproc-per-node 8": "--nproc-per-node 2",
    "--ranks 8": "--ranks 2",
    "--parallel.tensor 2 --parallel.pipeline 2": "--parallel.tensor 2",
    "--sequence-length 2048": "--sequence-length 64",
}
TOY_RUN_FILE = {
    'preset = "llama-3.2-1b"': (
        "hidden_size = 32\nnum_layers = 2\nnum_attention_heads = 4\nffn_hidden_size = 64"
    ),
    "global_batch_size = 512": "global_batch_size = 4",
    "micro_batch_size = 4": "micro_batch_size = 1",
    "sequence_length = 4096": "sequence_length = 32",
    "interval = 500": "interval = 2",
    "steps = 50000": 'steps = 4\ndevice = "cpu"\nprecision = "fp32"',
}


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path) -> list[str]:
    """Return the command lines of a page's bash blocks, comments left out."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [re.sub(r"\s+#.*", "", line).strip() for line in lines if line.strip()]


def toy(command: str) -> list[str]:
    """Return the words of a command at toy size, to be run in a reader's folder."""
    for text, replacement in TOY.items():
        command = command.replace(text, replacement)
    program, *words = shlex.split(command)
    words = [
        str(ROOT / word) if word.startswith(("tools/", "examples/")) else word for word in words
    ]
    if program == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", *words]
    return [sys.executable if program == "python" else program, *words]


def make_tokenizer(folder: Path, texts: list[str]) -> None:
    """Train a byte-level BPE of 700 ids into folder/tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture
def reader(tmp_path: Path) -> Path:
    """Return a folder with a reader's own text, chats, model folders and run files."""
    (tmp_path / "corpus").mkdir()
    texts = [path.read_text() for path in sorted((ROOT / "megatron_kd").rglob("*.py"))[:60]]
    for number, text in enumerate(texts):
        (tmp_path / f"corpus/{number}.txt").write_text(text)
    chats = [{"prompt": f"{n} and {n}?", "response": f"{2 * n}."} for n in range(400)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    for name, family in (("teacher", "llama"), ("Qwen3-0.6B", "qwen3")):
        folder = tmp_path / "models" / name
        make_model(folder, family, seed=1, vocab_size=700)
        make_tokenizer(folder, texts)
    (run_file,) = blocks(ROOT / "README.md", "toml")
    for text, replacement in TOY_RUN_FILE.items():
        assert text in run_file, text
        run_file = run_file.replace(text, replacement)
    (tmp_path / "run.toml").write_text(run_file)
    teacher = run_file.split("[teacher]")[0].replace("runs/student", "runs/teacher")
    (tmp_path / "teacher.toml").write_text(teacher)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command(reader: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    finished: set[str] = set()
    fresh = reader.parent / "fresh"
    shutil.copytree(reader, fresh)
    for page in PAGES:
        # This page makes the data from which README.md starts, with another tokenizer.
        folder = fresh if page.name == "data.md" else reader
        for command in commands(page):
            if command in ELSEWHERE or command in finished:
                continue
            words = toy(command)
            if "runs/teacher" in words and not (reader / "runs/teacher").exists():
                shutil.copytree(reader / "runs/student", reader / "runs/teacher")
            if "teacher.toml" in words:
                shutil.rmtree(reader / "runs/teacher", ignore_errors=True)
                shutil.rmtree(reader / "cache", ignore_errors=True)
            if words[-2:-1] == ["cache/"]:
                shutil.rmtree(reader / "runs/second", ignore_errors=True)
            done = subprocess.run(
                words,
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0, f"{page.name}: {command}\n{done.stdout}\n{done.stderr}"
            finished.add(command)
    assert len(finished) > 25


def test_other_commands_have_their_tests() -> None:
    shown = {command for page in PAGES for command in commands(page)}
    for command, path in ELSEWHERE.items():
        assert command in shown, command
        assert (ROOT / path).exists(), path


def test_python_of_the_pages_runs() -> None:
    """Execute the Python blocks with small random tensors under the names they use."""
    import torch

    torch.manual_seed(0)
    for page in PAGES:
        for code in blocks(page, "python"):
            hidden = torch.randn(6, 2, 16, requires_grad=True)
            weight = torch.randn(200, 16, requires_grad=True)
            values = {
                "teacher_hidden": torch.randn(6, 2, 24),
                "teacher_weight": torch.randn(200, 24),
                "hidden": hidden,
                "weight": weight,
                "labels": torch.randint(0, 200, (6, 2)),
                "group": None,
            }
            exec(code, values)
            assert values["loss"].total.shape == (6, 2)
            assert weight.grad is not None
