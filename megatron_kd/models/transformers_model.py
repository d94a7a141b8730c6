"""Models that transformers runs: loaded from local folders, never from code in them."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_kd.config import ConfigError


def load_causal_lm(folder: Path, dtype: torch.dtype, *, what: str) -> torch.nn.Module:
    """AutoModelForCausalLM of a local folder with safetensors: nothing is downloaded and no code of the folder is run."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise ConfigError(f"{what}: transformers is not installed: pip install 'megatron-kd[huggingface]'") from None
    if not (folder / "config.json").is_file():
        # transformers would take the path for the name of a model, and look in its cache of downloads.
        raise ConfigError(f"{what}: {folder} is no folder of a model (it has no config.json)")
    logging.disable_progress_bar()
    try:
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{what}: transformers cannot load {folder} ({reason})") from error
    return model.eval()
