"""Load models and tokenizers with transformers, from local folders and without their code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_kd.config import ConfigError

# Text on which tokenizers differ: numbers, contractions, case, whitespace, marks, other scripts.
_PROBE = "It's 1234567 of 3.14,  DON'T\n\n\tWe'll see: x==y; na\u00efve \u6f22\u5b57\u2026   end\n"


def load_causal_lm(folder: Path, dtype: torch.dtype, *, setting: str) -> torch.nn.Module:
    """Return AutoModelForCausalLM of a local folder with safetensors, in evaluation mode.

    Nothing is downloaded, and no code of the folder is run.

    Args:
        folder: the model folder.
        dtype: type of the weights.
        setting: beginning of error messages.

    Raises:
        ConfigError: transformers is not installed or cannot load the folder.
    """
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise ConfigError(
            f"{setting}: transformers is not installed: pip install 'megatron-kd[huggingface]'"
        ) from None
    if not (folder / "config.json").is_file():
        # transformers would take the path for a model's name and search its download cache.
        raise ConfigError(f"{setting}: {folder} is no folder of a model (it has no config.json)")
    logging.disable_progress_bar()
    try:
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        message = str(error).strip()
        reason = message.splitlines()[0][:200] if message else type(error).__name__
        raise ConfigError(f"{setting}: transformers cannot load {folder} ({reason})") from error
    return model.eval()


def load_text_tokenizer(folder: Path, *, setting: str) -> Any:
    """Return the tokenizer of a local folder.

    For some kinds of model transformers replaces the rules of the files by its own. Scores would
    then be those of ids that the model was not trained on.

    Args:
        folder: the model folder.
        setting: beginning of error messages.

    Raises:
        ConfigError: there is no tokenizer, or it encodes text otherwise than its tokenizer.json.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0][:150]
        raise ConfigError(
            f"{setting}: {folder} holds no tokenizer that transformers loads ({reason}): export it "
            "with --tokenizer"
        ) from error
    file = folder / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        expected = Tokenizer.from_file(str(file)).encode(_PROBE, add_special_tokens=False).ids
        ids = tokenizer(_PROBE, add_special_tokens=False).input_ids
        if ids != expected:
            raise ConfigError(
                f"{setting}: transformers does not read {file} as it is written: it makes "
                f"{len(ids)} "
                f"ids of a text of which the file makes {len(expected)}, so it would score other "
                "ids than the model was trained on (it has rules of its own for "
                f"{type(tokenizer).__name__}): use a tokenizer of that kind, or evaluate with "
                "tools/evaluate.py perplexity"
            )
    return tokenizer
