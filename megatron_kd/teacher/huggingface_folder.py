"""What can be known of a Hugging Face teacher before torch is imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from megatron_kd.config import ConfigError, ModelSection, RunConfig
from megatron_kd.data.tokenizer import load_tokenizer
from megatron_kd.models.huggingface.families import model_from_config
from megatron_kd.storage.json_files import read_json

_WHAT = "teacher.checkpoint"


def check_huggingface_teacher(config: RunConfig, *, vocab_size: int, digest: str | None) -> Path:
    """The teacher's folder. ConfigError where it is no model folder, or its ids are not proved to be this run's; no collective.

    digest: of data.tokenizer. With one, the teacher's own tokenizer must have the same vocabulary, and rows of its embedding past
    vocab_size are padding; without one there is nothing to compare, and the sizes must be equal.
    """
    folder = config.teacher.checkpoint
    assert folder is not None
    if config.data.document_attention == "within":
        raise ConfigError(
            'teacher.source = "huggingface" reads a sample as one text: set data.document_attention = "across", or convert the teacher '
            "(tools/convert_checkpoint.py)"
        )
    if not folder.is_dir():
        raise ConfigError(
            f"{_WHAT}: {folder} is not a folder (a Hugging Face teacher is read from a local folder; nothing is downloaded)"
        )
    content = read_json(folder / "config.json", what=_WHAT)
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{_WHAT}: {folder} holds no .safetensors file (pickled weights are never opened)"
        )
    rows = content.get("vocab_size")
    if not isinstance(rows, int):
        raise ConfigError(f"{_WHAT}: {folder / 'config.json'} does not say vocab_size")
    if digest is None and rows != vocab_size:
        raise ConfigError(
            f"{_WHAT}: {folder} has a vocabulary of {rows} ids, this run has {vocab_size}: set data.tokenizer, which proves which ids are "
            "the same, or use the same vocabulary"
        )
    if rows < vocab_size:
        raise ConfigError(
            f"{_WHAT}: {folder} has a vocabulary of {rows} ids, this run has {vocab_size}: use the same tokenizer"
        )
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            "teacher.source = \"huggingface\" needs transformers: pip install 'megatron-kd[huggingface]'"
        )
    use_zero3(config.teacher.shard_parameters, 1)
    if digest is not None:
        _check_tokenizer(config.teacher.tokenizer or _tokenizer_in(folder), digest)
    return folder


def _check_tokenizer(path: Path, digest: str) -> None:
    try:
        theirs = load_tokenizer(path)[1].digest
    except ConfigError as error:
        raise ConfigError(
            f"teacher.tokenizer: the teacher's ids cannot be compared with those of data.tokenizer ({error}): name its tokenizer"
        ) from error
    if theirs != digest:
        raise ConfigError(
            f"{_WHAT}: the teacher's tokenizer {path} has another vocabulary than data.tokenizer (digests {theirs} and {digest}): their "
            "ids do not mean the same, whatever the sizes"
        )


def _tokenizer_in(folder: Path) -> Path:
    """The SentencePiece model of the folder, or the folder itself."""
    model = folder / "tokenizer.model"
    return model if model.is_file() and not (folder / "tokenizer.json").is_file() else folder


def known_shape(folder: Path) -> ModelSection | None:
    """The model section of a folder of a family known here, None for another."""
    try:
        return model_from_config(read_json(folder / "config.json", what=_WHAT), what=_WHAT)
    except ConfigError:
        return None


def use_zero3(wanted: str, world_size: int) -> bool:
    """What teacher.shard_parameters comes to. ConfigError, on every rank alike, for zero3 without deepspeed."""
    installed = importlib.util.find_spec("deepspeed") is not None
    if wanted == "zero3" and not installed:
        raise ConfigError(
            'teacher.shard_parameters = "zero3" needs deepspeed, which is not installed: '
            "DS_BUILD_OPS=0 pip install --no-build-isolation 'megatron-kd[deepspeed]', or set it to \"none\""
        )
    return wanted == "zero3" or (wanted == "auto" and installed and world_size > 1)
