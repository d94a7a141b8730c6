"""Make small tokenizers of all kinds, unusual texts, and token files as Megatron-LM does."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import sentencepiece

from megatron_kd.data.vocabularies.patterns import PATTERNS

ROOT = Path(__file__).resolve().parents[2]
STDLIB = Path(json.__file__).parent
END = "<|endoftext|>"
_WORDS = [
    "def",
    "return",
    "self",
    "the",
    "and",
    "value",
    "x",
    "naïve",
    "漢字",
    "😀",
    "e\u0301",
    "don't",
    "12345",
    "3.14",
    "#!",
    "(a,b)",
    END,
]
_SPACES = [
    " ",
    " ",
    " ",
    "  ",
    "\n",
    "\n    ",
    "\t",
    " \n ",
    "\r\n",
    "\u00a0",
    "\u3000",
    "\x1c",
    "",
]


def load_tool(name: str) -> ModuleType:
    """Import tools/<name>.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses looks its module up by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def awkward_text(rng: random.Random, words: int) -> str:
    """Return random words, numbers, scripts, special tokens and whitespace of all kinds."""
    return "".join(rng.choice(_WORDS) + rng.choice(_SPACES) for _ in range(words)).lstrip(
        rng.choice(["", " "])
    )


def source_texts(limit: int = 400_000) -> list[str]:
    """Return sources of the standard library."""
    texts, size = [], 0
    for path in sorted(STDLIB.parent.glob("*.py")):
        texts.append(path.read_text(encoding="utf-8"))
        size += len(texts[-1])
        if size > limit:
            break
    return texts


def make_tokenizers(folder: Path) -> dict[str, Path]:
    """Train a tokenizer of each kind in a second; return the files by kind."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    from megatron_kd.data.tokenizer import load_tokenizer

    texts = source_texts(150_000)
    files = {}
    for name, prefix in (("sentencepiece", True), ("unigram", False)):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line for text in texts for line in text.splitlines()),
            model_writer=model,
            vocab_size=500,
            model_type="bpe" if prefix else "unigram",
            byte_fallback=prefix,
            normalization_rule_name="identity",
            add_dummy_prefix=prefix,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
            num_threads=1,
            hard_vocab_limit=False,
        )
        files[name] = folder / f"{name}.model"
        files[name].write_bytes(model.getvalue())
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERNS["cl100k"]), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([END])
    files["huggingface"] = folder / "tokenizer.json"
    tokenizer.save(str(files["huggingface"]))
    tokens = load_tokenizer(files["huggingface"])[0].tokens[:-1]
    files["tiktoken"] = folder / "ranks.tiktoken"
    files["tiktoken"].write_text(
        "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    )
    return files


def plain_encoder(kind: str, path: Path) -> tuple[Callable[[str], list[int]], int]:
    """Return the library's plain call for one text, and the id that ends documents."""
    if kind in ("sentencepiece", "unigram"):
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        return processor.encode, processor.eos_id()
    if kind == "huggingface":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
        return (
            lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
            tokenizer.token_to_id(END),
        )
    import tiktoken

    lines = [line.split() for line in path.read_bytes().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    encoding = tiktoken.Encoding(
        "plain", pat_str=PATTERNS["cl100k"], mergeable_ranks=ranks, special_tokens={END: len(ranks)}
    )
    return lambda text: encoding.encode(text, allowed_special="all"), len(ranks)


def write_as_megatron(
    prefix: Path,
    texts: Sequence[str],
    encode: Callable[[str], list[int]],
    end: int | None,
    vocab_size: int,
) -> None:
    """Write texts with the builder of Megatron-LM's tools/preprocess_data.py, one by one."""
    from megatron_kd.data.prefix_samples import quiet_megatron

    with quiet_megatron():
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for text in texts:
        ids = encode(text)
        lengths = [len(ids)] if ids else []
        if ids and end is not None:
            ids, lengths = [*ids, end], [len(ids) + 1]
        builder.add_document(np.array(ids), lengths)
    builder.finalize(f"{prefix}.idx")


def same_tokens(first: Path, second: Path) -> bool:
    """Return True if two token files are byte-identical."""
    return all(
        Path(f"{first}{ending}").read_bytes() == Path(f"{second}{ending}").read_bytes()
        for ending in (".bin", ".idx")
    )
