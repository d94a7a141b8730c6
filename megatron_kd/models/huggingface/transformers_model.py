"""Models that transformers runs: loaded from local folders, never from code in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_kd.config import ConfigError

# What tokenizers differ on: numbers, contractions, case, runs of whitespace, marks, other scripts.
_PROBE = "It's 1234567 of 3.14,  DON'T\n\n\tWe'll see: x==y; na\u00efve \u6f22\u5b57\u2026   end\n"


def load_causal_lm(folder: Path, dtype: torch.dtype, *, what: str) -> torch.nn.Module:
    """AutoModelForCausalLM of a local folder with safetensors: nothing is downloaded and no code of the folder is run."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise ConfigError(
            f"{what}: transformers is not installed: pip install 'megatron-kd[huggingface]'"
        ) from None
    if not (folder / "config.json").is_file():
        # transformers would take the path for the name of a model, and look in its cache of downloads.
        raise ConfigError(f"{what}: {folder} is no folder of a model (it has no config.json)")
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
        reason = (
            str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        )
        raise ConfigError(f"{what}: transformers cannot load {folder} ({reason})") from error
    return model.eval()


def load_text_tokenizer(folder: Path, *, what: str) -> Any:
    """The tokenizer of a local folder. ConfigError where there is none, or where it cuts text otherwise than its tokenizer.json says.

    transformers has rules of its own for some kinds of model, whatever the files say: texts would be scored that the model has never
    been taught to read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0][:150]
        raise ConfigError(
            f"{what}: {folder} holds no tokenizer that transformers loads ({reason}): export it with --tokenizer"
        ) from error
    file = folder / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        wanted = Tokenizer.from_file(str(file)).encode(_PROBE, add_special_tokens=False).ids
        found = tokenizer(_PROBE, add_special_tokens=False).input_ids
        if found != wanted:
            raise ConfigError(
                f"{what}: transformers does not read {file} as it is written: it makes {len(found)} ids of a text of which the file "
                f"makes {len(wanted)}, so it would score other ids than the model was trained on (it has rules of its own for "
                f"{type(tokenizer).__name__}): use a tokenizer of that kind, or evaluate with tools/evaluate.py perplexity"
            )
    return tokenizer
