"""Train a small distilled student, and list the tool calls that the tests examine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from megatron_kd.checkpoint.conversion.from_huggingface import open_huggingface, write_checkpoint
from megatron_kd.config import ModelSection, RunConfig, dump_toml
from megatron_kd.data.preparation.token_file_writer import TokenFileWriter
from megatron_kd.data.token_files import read_index
from megatron_kd.data.tokenizer import load_tokenizer
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny
from tests.inference.use_ranks import (
    MEASURED,
    NEW_TOKENS,
    PROMPTS,
    VOCAB,
    StudentResults,
    train_and_use,
)
from tests.losses.cases import fresh_seed
from tests.models.folders import write_folder

ROOT = Path(__file__).parents[2]
Call = list[object]


class Student:
    """Hold a folder with a tokenizer, token files, and a student distilled at tensor size 2.

    Attributes:
        folder: The folder.
        run: Directory of the run.
        tokenizer: Path of the tokenizer.
        results: Results of two ranks that used the student.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        texts = [
            path.read_text(encoding="utf-8")
            for path in sorted((ROOT / "megatron_kd").rglob("*.py"))
        ]
        self.tokenizer = self._train_tokenizer(texts)
        processor, info = load_tokenizer(self.tokenizer)
        documents = [[*processor.encode(text), info.end_of_document] for text in texts]
        train = self._write_tokens("train", documents[8:], info.digest)
        valid = self._write_tokens("valid", documents[:8], info.digest)
        short = [
            ids[start : start + 60 + start % 97]
            for ids in documents[:20]
            for start in range(0, min(len(ids), 400), 157)
        ]
        self._write_tokens("short", [*short[:5], [7], *short[5:]], info.digest)
        self._write_tokens("foreign", short, "0" * 64)
        self._write_teacher(info.digest)
        config = self._config(train, valid)
        self.results: StudentResults = run_ranks(
            train_and_use, 2, config, valid, str(self.tokenizer), timeout=300
        )[0]
        assert (self.run / "config.toml").read_text() == dump_toml(config)

    def _train_tokenizer(self, texts: list[str]) -> Path:
        corpus = self.folder / "corpus"
        corpus.mkdir()
        for index, text in enumerate(texts):
            (corpus / f"{index}.txt").write_text(text, encoding="utf-8")
        path = self.folder / "tokenizer.model"
        options = ["--input", str(corpus), "--vocab-size", str(VOCAB), "--output", str(path)]
        subprocess.run(
            [sys.executable, str(ROOT / "tools/train_tokenizer.py"), *options],
            check=True,
            capture_output=True,
            timeout=100,
        )
        return path

    def _write_tokens(self, name: str, documents: list[list[int]], digest: str) -> str:
        prefix = self.folder / name
        lengths = np.array([len(document) for document in documents], dtype=np.int32)
        with TokenFileWriter(prefix, np.dtype("<u2")) as writer:
            writer.add(np.concatenate(documents).astype("<u2"), lengths)
            writer.commit(
                tokenizer_digest=digest, vocab_size=VOCAB, bytes=4 * sum(map(len, documents))
            )
        return str(prefix)

    def _write_teacher(self, digest: str) -> None:
        model = ModelSection(
            hidden_size=48,
            num_layers=2,
            num_attention_heads=2,
            ffn_hidden_size=48,
            vocab_size=VOCAB,
        )
        source = open_huggingface(
            write_folder(self.folder / "teacher_hf", model, seed=fresh_seed(), scale=0.1)
        )
        write_checkpoint(self.folder / "teacher", source, tokenizer=digest)

    def _config(self, train: str, valid: str) -> RunConfig:
        return tiny(
            self.run,
            train,
            data={
                "train": [train],
                "valid": {"held_out": valid},
                "tokenizer": str(self.tokenizer),
            },
            model={"vocab_size": VOCAB, "tied_embeddings": True, "init_std": 0.1},
            batch={"sequence_length": 48},
            train={"steps": 40, "evaluate_batches": MEASURED // 4},
            parallel={"tensor": 2},
            teacher={"source": "online", "checkpoint": str(self.folder / "teacher")},
            # The projection to the teacher's width trains along. It must not appear in anything
            # that reads the checkpoint.
            distill={
                "alpha": 0.1,
                "top_k": 16,
                "hidden_states": [{"student_layer": 3, "teacher_layer": 1, "weight": 0.1}],
            },
        )

    def stop_string(self) -> str:
        """Return text in the middle of the first greedy continuation, as a user would type it."""
        return json.dumps(self.results.greedy["one"][0][8:12])[1:-1]


def read_documents(prefix: Path) -> list[bytes]:
    """Return the ids of each document of a token file, as bytes."""
    index = read_index(prefix)
    data = Path(f"{prefix}.bin").read_bytes()
    return [
        data[begin : begin + 2 * int(length)]
        for begin, length in zip(index.offsets.tolist(), index.lengths, strict=True)
    ]


SCORE_SOURCES: Call = ["--data", "short", "--teacher", "run", "--reference", "teacher"]
SCORE: Call = ["score_data.py", *SCORE_SOURCES, "--shard-tokens", 500]


def valid_calls(student: Student) -> dict[str, Call]:
    """Return name -> tool and arguments of the calls that succeed."""
    generate: Call = ["generate.py", "run", "--max-new-tokens", NEW_TOKENS, "--json"]
    prompts = [option for prompt in PROMPTS[:2] for option in ("--prompt", prompt)]
    perplexity: Call = ["evaluate.py", "perplexity"]
    tokenizer: Call = ["--tokenizer", student.tokenizer]
    limit: Call = ["--max-sequences", MEASURED]
    export = ["convert_checkpoint.py", "to-huggingface", "run", "--output", "exported"]
    import_ = ["convert_checkpoint.py", "from-huggingface", "exported", "--output", "imported"]
    two_sets = ["--data", "in=valid", "--data", "out=train"]
    return {
        "export": [*export, *tokenizer, "--check"],
        "generate": [*generate, *prompts],
        "stop": [*generate, "--prompt", PROMPTS[0], "--stop", student.stop_string()],
        "perplexity": [*perplexity, "run", *limit, "--json", "out/results.json"],
        "import": [*import_, *tokenizer],
        "beside a teacher": [
            *perplexity,
            "run",
            *two_sets,
            "--teacher",
            "teacher",
            *limit,
            "--json",
            "both.json",
        ],
        "perplexity of the import": [
            *perplexity,
            "imported",
            "--data",
            "v=valid",
            "--sequence-length",
            48,
        ],
        "score": [*SCORE, "--keep-fraction", "0.5", "--output", "chosen"],
        "score again": [
            *SCORE,
            "--keep-tokens",
            700,
            "--output",
            "fewer",
            "--scores",
            "chosen.scores",
        ],
    }


_GENERATE: Call = ["generate.py", "run", "--prompt", "x"]
_PERPLEXITY: Call = ["evaluate.py", "perplexity", "run"]
_SCORE_TO_Y: Call = ["score_data.py", *SCORE_SOURCES, "--output", "y"]
_EXPORT: Call = ["convert_checkpoint.py", "to-huggingface", "run", "--output"]

# Name -> (tool and arguments, text that the error message contains).
INVALID_CALLS: dict[str, tuple[Call, str]] = {
    "no checkpoint": (["generate.py", "nowhere", "--prompt", "x"], "no checkpoint at nowhere"),
    "no prompt": (["generate.py", "run"], "give at least one --prompt"),
    "temperature": ([*_GENERATE, "--temperature", "-1"], "temperature (-1.0) must be >= 0"),
    "no number": (
        [*_GENERATE, "--temperature", "nan"],
        "temperature (nan) must be >= 0 and finite",
    ),
    "top_p": ([*_GENERATE, "--top-p", "0"], "top_p (0.0) must be in (0, 1]"),
    "tensor": ([*_GENERATE, "--tensor", "3"], "must be a multiple of --tensor (3)"),
    "ranks": ([*_GENERATE, "--tensor", "2"], "1 processes cannot be split"),
    "other tokenizer": ([*_GENERATE, "--tokenizer", "corpus/1.txt"], "is no tokenizer"),
    "no data": ([*_PERPLEXITY, "--data", "x=absent"], "absent"),
    "no teacher": ([*_PERPLEXITY, "--teacher", "absent"], "--teacher: no checkpoint at absent"),
    "form of data": ([*_PERPLEXITY, "--data", "valid"], "--data valid must be NAME=PREFIX"),
    "long sequences": (
        [*_PERPLEXITY, "--sequence-length", "9000000"],
        "fewer than one sequence",
    ),
    "no rule": (_SCORE_TO_Y, "say what to keep with one of --keep-fraction"),
    "large fraction": (
        [*_SCORE_TO_Y, "--keep-fraction", "1.5"],
        "--keep-fraction (1.5) must be in (0, 1]",
    ),
    "high threshold": (
        [*SCORE, "--output", "y", "--scores", "chosen.scores", "--threshold", "99"],
        "no document is kept by SelectionRule",
    ),
    "data of another tokenizer": (
        [
            "score_data.py",
            "--data",
            "foreign",
            *SCORE_SOURCES[2:],
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
            *SCORE_SOURCES[:4],
            "--reference",
            "z",
            "--output",
            "y",
            "--keep-tokens",
            "9",
        ],
        "--reference: no checkpoint at z",
    ),
    "existing output": ([*_EXPORT, "corpus"], "exists already"),
    "shard size": ([*_EXPORT, "x", "--shard-gigabytes", "nan"], "(nan) must be > 0"),
    "positions": ([*_EXPORT, "x", "--max-positions", "0"], "(0) must be at least 1"),
    "no ranks": (
        ["describe_model.py", "--preset", "qwen3-0.6b", "--ranks", "0"],
        "--ranks (0) must be at least 1",
    ),
    "no positions": (
        ["convert_checkpoint.py", "to-huggingface", "teacher", "--output", "x"],
        "--max-positions is needed",
    ),
}
