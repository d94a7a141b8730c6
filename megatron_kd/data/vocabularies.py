"""Three kinds of vocabulary behind one face: SentencePiece models, Hugging Face's fast tokenizers, tiktoken ranks.

What each says about text is what its own library says (sentencepiece, tokenizers, tiktoken); here are only the differences.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from megatron_kd.config import ConfigError
from megatron_kd.data.indexed import optimal_dtype

# How text is cut before ranks are merged. Every one of these cuts before a space that follows no whitespace: a space can only be
# the first character of a match, or a part of a run of whitespace.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_END_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|end▁of▁sentence|>", "[EOS]")


class Untokenizable(ValueError):
    """Text for which the tokenizer's own library finds no ids; the message says why."""


@dataclass
class Vocabulary:
    """Base of the three kinds.

    Attributes:
        kind: "sentencepiece", "huggingface" or "tiktoken".
        tokens: the bytes of text that each id stands for, in id order; b"" for an id that is not used.
        special: ids that never come from merging text.
        end_of_document: id written after each document, None where the tokenizer names none.
        cuts_at_spaces: a document's ids are those of its parts, cut before any space that follows no whitespace.
        leading_space: a document is encoded as if a space stood in front of it.
        other_space: a character that stands for a space too; "" where there is none.
        remember_words: encoding a word costs so much more than looking it up that remembering pays.
        looks_nearby: how text is cut here does not depend on what stands thousands of characters away.
        pattern: tiktoken: the expression that cuts text before ranks are merged.
        chat_template: jinja source of the tokenizer's own template for conversations.
    """

    kind: str
    tokens: list[bytes]
    special: frozenset[int]
    end_of_document: int | None
    cuts_at_spaces: bool = False
    leading_space: bool = False
    other_space: str = ""
    remember_words: bool = False
    looks_nearby: bool = True
    pattern: str | None = None
    chat_template: str | None = None
    dtype: np.dtype = field(init=False)

    def __post_init__(self) -> None:
        self.dtype = optimal_dtype(len(self.tokens))

    def encode_batch(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text, as bytes of `dtype`, as if it stood inside a document. Untokenizable where there are none."""
        raise NotImplementedError

    def encode_document(self, text: str) -> bytes:
        """The ids of one complete document, as bytes of `dtype`."""
        return self.encode_batch([text])[0]

    def encode(self, text: str) -> list[int]:
        """The ids of one complete document."""
        ids: list[int] = np.frombuffer(self.encode_document(text), self.dtype).tolist()
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids; special ids by their names."""
        return b"".join(self.tokens[index] for index in ids).decode("utf-8", errors="replace")

    def id_of(self, name: str) -> int:
        """The id whose text is `name`; a special one where there are several. ConfigError where there is none."""
        data = name.encode("utf-8")
        found = [index for index, token in enumerate(self.tokens) if token == data]
        if not found:
            raise ConfigError(f"the tokenizer has no token {name!r}: name one that it has")
        return next((index for index in found if index in self.special), found[0])

    def _array(self, ids: Sequence[int]) -> bytes:
        return np.array(ids, dtype=self.dtype).tobytes()


class SentencePieceVocabulary(Vocabulary):
    """A .model file."""

    def __init__(self, model: bytes) -> None:
        processor = SentencePieceProcessor()
        processor.LoadFromSerializedProto(model)
        protos: Any = sentencepiece_model_pb2  # made at import, unknown to type checkers
        proto = protos.ModelProto.FromString(model)
        pieces = [piece.piece for piece in proto.pieces]
        ids = range(len(pieces))
        special = frozenset(
            i
            for i in ids
            if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i)
        )
        tokens = [
            _piece_bytes(text, processor.is_byte(i), i in special) for i, text in enumerate(pieces)
        ]
        spec = proto.normalizer_spec
        plain = spec.name == "identity" or not spec.precompiled_charsmap
        whole_words = not any("▁" in text.lstrip("▁") or " " in text for text in pieces)
        space_known = processor.piece_to_id("▁") not in special
        simple = (
            plain
            and whole_words
            and space_known
            and spec.escape_whitespaces
            and not spec.remove_extra_whitespaces
        )
        merges = proto.trainer_spec.model_type == protos.TrainerSpec.BPE
        cuts = bool(simple and merges and not proto.trainer_spec.treat_whitespace_as_suffix)
        eos = processor.eos_id() if processor.eos_id() >= 0 else None
        super().__init__(
            "sentencepiece",
            tokens,
            special,
            eos,
            cuts,
            bool(spec.add_dummy_prefix),
            "▁",
            cuts,
            looks_nearby=False,
        )
        self._whole, self._inside = processor, processor
        if spec.add_dummy_prefix:
            spec.add_dummy_prefix = False
            self._inside = SentencePieceProcessor()
            self._inside.LoadFromSerializedProto(proto.SerializeToString())

    def encode_batch(self, texts: Sequence[str]) -> list[bytes]:
        return [self._array(ids) for ids in self._inside.encode(list(texts), num_threads=1)]

    def encode_document(self, text: str) -> bytes:
        return self._array(self._whole.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._whole.decode([int(index) for index in ids])
        return text


def _piece_bytes(piece: str, is_byte: bool, special: bool) -> bytes:
    if is_byte:
        return bytes([int(piece[3:5], 16)])
    return piece.encode("utf-8") if special else piece.replace("▁", " ").encode("utf-8")


class HuggingFaceVocabulary(Vocabulary):
    """A tokenizer.json, or a folder with one and what transformers writes beside it."""

    def __init__(self, content: bytes, settings: dict[str, Any]) -> None:
        # One process encodes on one core: the tool starts as many processes as it is told to.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._tokenizer = _library("tokenizers", "Hugging Face tokenizers").Tokenizer.from_str(
            content.decode("utf-8")
        )
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        rules = json.loads(self._tokenizer.to_str())
        names = self._tokenizer.get_vocab(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        special = frozenset(index for index, token in added.items() if token.special)
        to_bytes = _token_bytes_of(rules)
        tokens = [b""] * (max(names.values()) + 1)
        for name, index in names.items():
            tokens[index] = name.encode("utf-8") if index in added else to_bytes(name)
        end = settings.get("eos_token")
        end = end.get("content") if isinstance(end, dict) else end
        known = [end] if end else [added[index].content for index in sorted(special)]
        end = next((name for name in _END_NAMES if name in known), end)
        cuts = _cuts_at_spaces(rules, added.values())
        template = settings.get("chat_template")
        super().__init__("huggingface", tokens, special, names.get(end), cuts, remember_words=cuts)
        self.chat_template = template if isinstance(template, str) else None
        self.looks_nearby = rules["model"]["type"] != "Unigram"

    def encode_batch(self, texts: Sequence[str]) -> list[bytes]:
        return [
            self._array(found.ids)
            for found in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode([int(index) for index in ids], skip_special_tokens=False)
        return text


def _cuts_at_spaces(rules: dict[str, Any], added: Iterable[Any]) -> bool:
    """Whether a tokenizer.json is byte-level BPE over one of PATTERNS and nothing else."""
    last, splits = rules.get("pre_tokenizer") or {}, True
    if last.get("type") == "Sequence" and len(last["pretokenizers"]) == 2:
        split, last = last["pretokenizers"]
        splits = (
            split.get("type") == "Split"
            and split.get("behavior") == "Isolated"
            and not split.get("invert")
        )
        splits = (
            splits
            and split["pattern"].get("Regex") in PATTERNS.values()
            and not last.get("use_regex")
        )
    elif not last.get("use_regex"):
        return False
    # Composing characters never reaches over a space.
    normalizes = rules.get("normalizer") not in (
        None,
        {"type": "NFC"},
        {"type": "Sequence", "normalizers": []},
    )
    model = rules["model"]
    if not splits or normalizes or last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return False
    plain = all(
        not (" " in token.content or token.lstrip or token.rstrip or token.single_word)
        for token in added
    )
    return plain and model["type"] == "BPE" and not model.get("dropout")


def _token_bytes_of(rules: dict[str, Any]) -> Any:
    """What turns a token's name into the bytes it stands for."""
    decoder = json.dumps(rules.get("decoder") or {})
    if '"ByteLevel"' in decoder:
        table = _byte_of_character()
        return lambda name: (
            bytes(table[c] for c in name) if all(c in table for c in name) else name.encode("utf-8")
        )
    if '"ByteFallback"' in decoder or '"Metaspace"' in decoder or "▁" in decoder:
        return lambda name: _piece_bytes(
            name, len(name) == 6 and name.startswith("<0x") and name.endswith(">"), False
        )
    return lambda name: name.encode("utf-8")


def _byte_of_character() -> dict[str, int]:
    """GPT-2's way of writing bytes as printable characters: those that are printable as themselves, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


class TiktokenVocabulary(Vocabulary):
    """A .tiktoken file: one line `base64 rank` per token. Its special token <|endoftext|> takes the id after the last rank.

    The file does not say how text is cut before merging. pattern: a name in PATTERNS or an expression; None: "cl100k" where the
    vocabulary has numbers of several digits, else "qwen".
    """

    def __init__(self, ranks: dict[bytes, int], pattern: str | None) -> None:
        library = _library("tiktoken", "tiktoken vocabularies")
        pattern = pattern or ("cl100k" if b"12" in ranks else "qwen")
        expression = PATTERNS.get(pattern, pattern)
        end = max(ranks.values()) + 1
        try:
            self._encoding = library.Encoding(
                "ranks", pat_str=expression, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": end}
            )  # fmt: skip
        except Exception as error:
            raise ConfigError(
                f"the pattern {pattern!r} cannot be used ({error}): give one of {', '.join(PATTERNS)}"
            ) from error
        tokens = [b""] * (end + 1)
        for token, rank in ranks.items():
            tokens[rank] = token
        tokens[end] = b"<|endoftext|>"
        super().__init__(
            "tiktoken",
            tokens,
            frozenset({end}),
            end,
            expression in PATTERNS.values(),
            pattern=pattern,
        )

    def encode_batch(self, texts: Sequence[str]) -> list[bytes]:
        encode = self._encoding.encode_to_numpy
        try:
            return [
                encode(text, allowed_special="all").astype(self.dtype).tobytes() for text in texts
            ]
        except ValueError as error:  # its expressions give up on a run of a million spaces, say
            raise Untokenizable(
                f"tiktoken finds no ids for it: {' '.join(str(error).split())}"
            ) from error


def parse_ranks(content: bytes) -> dict[bytes, int] | None:
    """The ranks in the content of a .tiktoken file; None where it is something else."""
    ranks: dict[bytes, int] = {}
    try:
        for line in content.splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError:
        return None
    return (
        ranks
        if ranks and min(ranks.values()) >= 0 and len(set(ranks.values())) == len(ranks)
        else None
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """What transformers says of a tokenizer beside its tokenizer.json: eos_token and chat_template."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(
                    f"{path} is not JSON ({error}): repair it, or give tokenizer.json by itself"
                ) from error
            found |= {
                key: content[key] for key in ("eos_token", "chat_template") if content.get(key)
            }
    template = folder / "chat_template.jinja"
    return found | (
        {"chat_template": template.read_text(encoding="utf-8")} if template.is_file() else {}
    )


def _library(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{what} need the package {name}: pip install 'megatron-kd[preprocess]'"
        ) from error
