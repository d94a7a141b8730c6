"""The files that make transformers tokenize as this program does."""

from __future__ import annotations

import json
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from megatron_kd.config import ConfigError

_HUGGINGFACE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# Without this class transformers takes that of the model's family, which puts rules of its own in the place of the file's.
_PLAIN = {
    "tokenizer_config.json": b'{"tokenizer_class": "TokenizersBackend", "clean_up_tokenization_spaces": false}\n'
}


def huggingface_files(path: Path) -> dict[str, bytes]:
    """Name -> content of the tokenizer's files in a Hugging Face folder. ConfigError for a kind that transformers cannot read.

    A SentencePiece model gets a tokenizer_config.json that takes over its own rules for spaces and adds no special ids, as
    here. A Hugging Face tokenizer is copied: with what lies beside it for a folder or a tokenizer.json, alone under another name.
    """
    folder = path if path.is_dir() else path.parent
    if path.is_dir() or path.name == "tokenizer.json":
        found = {
            name: (folder / name).read_bytes() for name in _HUGGINGFACE if (folder / name).is_file()
        }
        if "tokenizer.json" in found:
            return {**_PLAIN, **found}
        path = folder / "tokenizer.model"
    if path.is_file() and _is_tokenizer_json(path):
        return {**_PLAIN, "tokenizer.json": path.read_bytes()}
    processor = SentencePieceProcessor()
    try:
        model = path.read_bytes()
        processor.LoadFromSerializedProto(model)
    except (OSError, RuntimeError):
        raise ConfigError(
            f"the tokenizer {path} has no form that transformers reads: give a SentencePiece .model or tokenizer.json"
        ) from None
    return {
        "tokenizer.model": model,
        "tokenizer_config.json": json.dumps(_llama_config(processor), indent=2).encode() + b"\n",
    }


def _is_tokenizer_json(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(content, dict) and "model" in content


def _llama_config(processor: SentencePieceProcessor) -> dict[str, object]:
    names = {
        "unk_token": processor.unk_id(),
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
    }
    # Without the rule that puts a space in front of every text, a text and the same text after a space are cut differently.
    prefixed = processor.encode("a") == processor.encode(" a")
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": prefixed,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        **{name: processor.id_to_piece(number) for name, number in names.items() if number >= 0},
    }
