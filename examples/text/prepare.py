r"""Write a tokenizer and token files for sweeps of language models, without any download.

    python examples/text/prepare.py OUTPUT --vocab-size 2048 --tokens 1310721
    python examples/text/prepare.py OUTPUT --vocab-size 2048 --tokens 1310721 \
        --text corpus/ --pattern '*.txt' --ood FILE

Files:
    OUTPUT/tokenizer.model  the tokenizer

Token files, each as .bin, .idx and .json:
    OUTPUT/train    exactly --tokens tokens of the text, so that a pass has a known number of steps
    OUTPUT/heldout  whole documents of the same text that are not in train: in-domain
    OUTPUT/prose    the language reference that Python's help() shows: out-of-domain
    OUTPUT/other    --ood FILE, or without it this repository's documents and licence

Without --text the text is the sources of Python's library. The same inputs give the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_kd.config import ConfigError
from megatron_kd.data.preparation.token_file_writer import TokenFileWriter
from megatron_kd.data.token_files import read_index

ROOT = Path(__file__).resolve().parents[2]
# Tests, installed packages, and tables and texts that are not code.
EXCLUDED = (
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "encodings",
    "pydoc_data",
    "__pycache__",
    "config-*",
)
# Keys of a token file's description that stay true when documents are cut.
_COPIED_KEYS = ("tokenizer_digest", "vocab_size", "end_of_document", "append_eod")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare the files and return 0, or 2 after an error message."""
    parsed = _parser().parse_args(arguments)
    try:
        print(json.dumps(prepare(parsed), indent=2))
        return 0
    except ConfigError as error:
        print(f"prepare: error: {error}", file=sys.stderr)
        return 2


def prepare(parsed: argparse.Namespace) -> dict[str, int]:
    """Write all files and return the number of tokens of each token file.

    Raises:
        ConfigError: An argument is invalid, the text is too short, or a tool failed.
    """
    output: Path = parsed.output
    if parsed.tokens < 2:
        raise ConfigError(f"--tokens ({parsed.tokens}) must be at least 2")
    if parsed.text:
        source_options = ["--input", parsed.text, "--pattern", *parsed.pattern]
    else:
        source_options = [
            "--input",
            sysconfig.get_path("stdlib"),
            "--pattern",
            "*.py",
            "--exclude",
            *EXCLUDED,
        ]
    model = str(output / "tokenizer.model")
    _tool(
        "train_tokenizer",
        *source_options,
        "--vocab-size",
        str(parsed.vocab_size),
        "--output",
        model,
    )
    _encode(source_options, model, output / "all", "--holdout", f"heldout={parsed.holdout}")
    cut(output / "all", output / "train", parsed.tokens)
    write_prose(output / "texts/prose", parsed.prose_bytes)
    _encode(["--input", str(output / "texts/prose")], model, output / "prose")
    other = [parsed.ood] if parsed.ood else [str(path) for path in repository_documents()]
    _encode(["--input", *other], model, output / "other")
    return {
        name: read_index(output / name).num_tokens
        for name in ("train", "heldout", "prose", "other")
    }


def cut(source: Path, output: Path, tokens: int) -> None:
    """Write exactly `tokens` tokens of a token file, in a fixed random order of documents.

    All documents are whole but the last, which is cut.

    Args:
        source: Path of the token file to read, without its suffix.
        output: Path of the token file to write, without its suffix.
        tokens: Number of tokens to write.

    Raises:
        ConfigError: The source has fewer tokens.
    """
    index = read_index(source)
    if index.num_tokens < tokens:
        raise ConfigError(
            f"the text has {index.num_tokens} tokens outside the held-out ones, fewer than "
            f"--tokens {tokens}: give more text"
        )
    ids = np.memmap(f"{source}.bin", dtype=index.dtype, mode="r")
    description = json.loads(Path(f"{source}.json").read_text(encoding="utf-8"))
    with TokenFileWriter(output, index.dtype) as writer:
        # In the order of file names, neighbours would be of one package.
        for document in np.random.default_rng(0).permutation(len(index.lengths)):
            start = int(index.offsets[document]) // index.dtype.itemsize
            length = min(int(index.lengths[document]), tokens - writer.num_tokens)
            writer.add(np.array(ids[start : start + length]), np.array([length]))
        writer.commit(**{key: description[key] for key in _COPIED_KEYS})


def write_prose(folder: Path, min_bytes: int) -> None:
    """Write topics of Python's language reference, a file each, until they have `min_bytes` bytes.

    Topics are taken in the order of the digests of their names.
    """
    from pydoc_data.topics import topics

    folder.mkdir(parents=True, exist_ok=True)
    total = 0
    for name in sorted(topics, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if total >= min_bytes:
            break
        text = topics[name].encode()
        (folder / f"{name}.txt").write_bytes(text)
        total += len(text)


def repository_documents() -> list[Path]:
    """Return this repository's pages about programs, and its licence."""
    return [
        ROOT / "LICENSE",
        *sorted(
            path
            for folder in ("", "examples", "tests", "docker")
            for path in (ROOT / folder).glob("*.md")
        ),
    ]


def _encode(inputs: Sequence[str], tokenizer: str, prefix: Path, *options: str) -> None:
    _tool(
        "preprocess_data",
        *inputs,
        "--tokenizer",
        tokenizer,
        "--output",
        str(prefix),
        "--overwrite",
        *options,
    )


def _tool(name: str, *words: str) -> None:
    # A tool writes the reason of a failure to standard error.
    process = subprocess.run(
        [sys.executable, str(ROOT / f"tools/{name}.py"), *words], stdout=subprocess.PIPE, text=True
    )
    if process.returncode:
        raise ConfigError(
            f"tools/{name}.py stopped with exit code {process.returncode}; the reason is above"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--vocab-size", type=int, required=True, help="ids of the tokenizer")
    parser.add_argument(
        "--tokens",
        type=int,
        required=True,
        help="tokens of OUTPUT/train: one more than in whole samples",
    )
    parser.add_argument(
        "--text",
        default="",
        help='folder or file, as for tools/preprocess_data.py; "": the library of Python',
    )
    parser.add_argument(
        "--pattern", nargs="+", default=["*"], help="names of the files to take from --text (all)"
    )
    parser.add_argument(
        "--ood",
        default="",
        help='file or folder of another domain; "": the documents of this repository',
    )
    parser.add_argument(
        "--holdout", type=float, default=0.03, help="share of the documents that is held out (0.03)"
    )
    parser.add_argument(
        "--prose-bytes", type=int, default=200_000, help="bytes of the language reference (200000)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
