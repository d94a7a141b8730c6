"""Read Hugging Face's tokenizer.json files, alone or in a folder written by transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from megatron_kd.config import ConfigError
from megatron_kd.data.vocabularies.patterns import PATTERNS
from megatron_kd.data.vocabularies.sentencepiece import piece_bytes
from megatron_kd.data.vocabularies.vocabulary import TokenizerFileError, Vocabulary, import_library

_END_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|end▁of▁sentence|>", "[EOS]")


class HuggingFaceVocabulary(Vocabulary):
    """Encode text with a fast tokenizer of Hugging Face."""

    library: ClassVar[str] = "tokenizers"
    description: ClassVar[str] = "a tokenizer.json (or a folder with one)"
    file_names: ClassVar[tuple[str, ...]] = ("tokenizer.json",)

    def __init__(self, content: bytes, settings: dict[str, Any]) -> None:
        # A process encodes on one core; the tools start as many processes as requested.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        library = import_library("tokenizers", "Hugging Face tokenizers")
        self._tokenizer = library.Tokenizer.from_str(content.decode("utf-8"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        rules = json.loads(self._tokenizer.to_str())
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        special = frozenset(index for index, token in added.items() if token.special)
        to_bytes = _token_decoder(rules)
        tokens = [b""] * (max(ids.values()) + 1)
        for name, index in ids.items():
            tokens[index] = name.encode("utf-8") if index in added else to_bytes(name)
        end = settings.get("eos_token")
        end = end.get("content") if isinstance(end, dict) else end
        candidates = [end] if end else [added[index].content for index in sorted(special)]
        end = next((name for name in _END_NAMES if name in candidates), end)
        splits_at_spaces = _splits_at_spaces(rules, added.values())
        template = settings.get("chat_template")
        super().__init__(
            tokens,
            special,
            ids.get(end),
            splits_at_spaces=splits_at_spaces,
            caches_words=splits_at_spaces,
            splits_locally=rules["model"]["type"] != "Unigram",
            chat_template=template if isinstance(template, str) else None,
        )

    @classmethod
    def read(cls, file: Path, content: bytes, pattern: str | None) -> Vocabulary | None:
        """Return the vocabulary of a tokenizer.json; see `Vocabulary.read`."""
        if content.lstrip()[:1] != b"{":
            return None
        try:
            is_tokenizer = "model" in json.loads(content)
        except ValueError:
            return None
        if not is_tokenizer:
            return None
        settings = _read_settings(file.parent)
        try:
            return cls(content, settings)
        except ConfigError:
            raise
        except Exception as error:  # the library raises plain Exceptions
            raise TokenizerFileError(str(error)) from error

    def encode_batch(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each text; see `Vocabulary.encode_batch`."""
        batch = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._to_bytes(encoding.ids) for encoding in batch]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of these ids; special ids are written by name."""
        text: str = self._tokenizer.decode([int(index) for index in ids], skip_special_tokens=False)
        return text


def _splits_at_spaces(rules: dict[str, Any], added: Iterable[Any]) -> bool:
    """Return whether a tokenizer.json is byte-level BPE over one of PATTERNS and nothing else."""
    model = rules["model"]
    if model["type"] != "BPE" or model.get("dropout"):
        return False
    # Composing characters (NFC) never reaches across a space.
    if rules.get("normalizer") not in (
        None,
        {"type": "NFC"},
        {"type": "Sequence", "normalizers": []},
    ):
        return False
    return _is_byte_level(rules.get("pre_tokenizer") or {}) and all(
        not (" " in token.content or token.lstrip or token.rstrip or token.single_word)
        for token in added
    )


def _is_byte_level(pre_tokenizer: dict[str, Any]) -> bool:
    """Return whether text is split by one of PATTERNS and then written as bytes."""
    last = pre_tokenizer
    if last.get("type") == "Sequence" and len(last["pretokenizers"]) == 2:
        split, last = last["pretokenizers"]
        splits_by_pattern = (
            split.get("type") == "Split"
            and split.get("behavior") == "Isolated"
            and not split.get("invert")
            and split["pattern"].get("Regex") in PATTERNS.values()
            and not last.get("use_regex")
        )
    else:
        splits_by_pattern = bool(last.get("use_regex"))  # the pattern of GPT-2
    is_bytes = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    return splits_by_pattern and is_bytes


def _token_decoder(rules: dict[str, Any]) -> Callable[[str], bytes]:
    """Return the function from a token's name to the bytes that it stands for."""
    decoder = json.dumps(rules.get("decoder") or {})
    if '"ByteLevel"' in decoder:
        table = _byte_of_character()
        return lambda name: (
            bytes(table[c] for c in name) if all(c in table for c in name) else name.encode("utf-8")
        )
    if '"ByteFallback"' in decoder or '"Metaspace"' in decoder or "▁" in decoder:
        return lambda name: piece_bytes(
            name, is_byte=len(name) == 6 and name.startswith("<0x") and name.endswith(">")
        )
    return lambda name: name.encode("utf-8")


def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's table from printable characters to bytes.

    A printable byte is its own character; the others are the characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + position): byte for position, byte in enumerate(others)
    }


def _read_settings(folder: Path) -> dict[str, Any]:
    """Read eos_token and chat_template from the files of transformers beside a tokenizer.json."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(
                f"{path} is not JSON ({error}): repair it, or give tokenizer.json by itself"
            ) from error
        settings |= {
            key: content[key] for key in ("eos_token", "chat_template") if content.get(key)
        }
    template = folder / "chat_template.jinja"
    if template.is_file():
        settings["chat_template"] = template.read_text(encoding="utf-8")
    return settings
