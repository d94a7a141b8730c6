"""Provide the files that make transformers tokenize as this project does."""

from __future__ import annotations

import json
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from megatron_kd.config import ConfigError

_HUGGINGFACE_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# Without this class transformers uses that of the model's family, whose rules replace the file's.
_GENERIC_CONFIG = {
    "tokenizer_config.json": (
        b'{"tokenizer_class": "TokenizersBackend", "clean_up_tokenization_spaces": false}\n'
    )
}


def huggingface_files(path: Path) -> dict[str, bytes]:
    """Return the tokenizer's files in a Hugging Face folder, content by name.

    A SentencePiece model gets a tokenizer_config.json that keeps the model's own rules for spaces
    and adds no special ids, as in this project. A Hugging Face tokenizer is copied: with the files
    beside it for a folder or a tokenizer.json, alone under another name.

    Raises:
        ConfigError: transformers cannot read a tokenizer of this kind.
    """
    folder = path if path.is_dir() else path.parent
    if path.is_dir() or path.name == "tokenizer.json":
        contents = {
            name: (folder / name).read_bytes()
            for name in _HUGGINGFACE_NAMES
            if (folder / name).is_file()
        }
        if "tokenizer.json" in contents:
            return {**_GENERIC_CONFIG, **contents}
        path = folder / "tokenizer.model"
    if path.is_file() and _is_tokenizer_json(path):
        return {**_GENERIC_CONFIG, "tokenizer.json": path.read_bytes()}
    processor = SentencePieceProcessor()
    try:
        model = path.read_bytes()
        processor.LoadFromSerializedProto(model)
    except (OSError, RuntimeError):
        raise ConfigError(
            f"the tokenizer {path} has no form that transformers reads: "
            "give a SentencePiece .model or tokenizer.json"
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
    special_ids = {
        "unk_token": processor.unk_id(),
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
    }
    # Without a rule that adds a leading space, "a" and " a" are encoded differently.
    adds_prefix_space = processor.encode("a") == processor.encode(" a")
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": adds_prefix_space,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        **{name: processor.id_to_piece(index) for name, index in special_ids.items() if index >= 0},
    }
