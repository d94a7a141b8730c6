"""lm-evaluation-harness on an exported model and local task files."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch

from megatron_kd.config import ConfigError
from megatron_kd.models.huggingface.transformers_model import load_causal_lm, load_text_tokenizer

_NEEDED = ("task", "data_file", "output_type", "doc_to_text")


def read_task(path: Path, data_folder: Path) -> dict[str, Any]:
    """A task file as lm-evaluation-harness's task configuration, on the local JSON lines of `data_file` in `data_folder`.

    The file is plain YAML: tags that would call Python are an error, and so is a data set from elsewhere. ConfigError.
    """
    try:
        import yaml
    except ImportError as error:
        raise _missing(error) from None
    try:
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(
            f"--task {path} cannot be read ({' '.join(str(error).split())[:200]})"
        ) from error
    missing = [name for name in _NEEDED if not isinstance(task, dict) or name not in task]
    if missing:
        raise ConfigError(
            f"--task {path} lacks {missing[0]}: see examples/evaluation for a whole one"
        )
    foreign = [
        name
        for name in (
            "dataset_path",
            "dataset_name",
            "dataset_kwargs",
            "custom_dataset",
            "include",
            "unsafe_code",
        )
        if name in task
    ]
    if foreign:
        raise ConfigError(f"--task {path} sets {foreign[0]}: data comes from data_file alone")
    data = data_folder / str(task.pop("data_file"))
    if not data.is_file():
        raise ConfigError(
            f"--task {path}: its data {data} does not exist: name its folder with --data-folder"
        )
    local = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
    }
    return {**task, **local}


def run_tasks(
    folder: Path,
    tasks: list[dict[str, Any]],
    *,
    limit: int | None,
    batch_size: int,
    device: str,
    max_length: int | None = None,
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value (and the standard error of accuracies), with the number of items as `items`. Nothing is downloaded.

    max_length: tokens of the longest input, older ones are cut off; None: what config.json says.
    """
    # Read when the libraries are imported.
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise _missing(error) from error
    model = load_causal_lm(
        folder, torch.float32 if device == "cpu" else torch.bfloat16, what="model"
    ).to(device)
    tokenizer = load_text_tokenizer(folder, what="model")
    start = _start_id(model, tokenizer, folder)
    wrapped = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        device=device,
        max_length=max_length,
        prefix_token_id=start,
    )
    manager = TaskManager(include_defaults=False)
    try:
        found = lm_eval.simple_evaluate(
            wrapped,
            tasks=list(tasks),
            limit=limit,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=False,
        )
    except AssertionError as error:
        # The harness cuts contexts, not answers.
        raise ConfigError(
            f"an answer is longer than the model's {wrapped.max_length} positions: set --max-length"
        ) from error
    results = {}
    for name, metrics in found["results"].items():
        numbers = {
            key.partition(",")[0]: value
            for key, value in metrics.items()
            if isinstance(value, float) and value == value
        }
        items = found["n-samples"][name]["effective"]
        errors = {
            f"{key}_stderr": _standard_error(value, items)
            for key, value in numbers.items()
            if key.startswith("acc") and items > 1
        }
        results[name] = {**numbers, **errors, "items": items}
    return results


def _start_id(model: Any, tokenizer: Any, folder: Path) -> int:
    """The id that stands before a text without context: the first known of bos and eos, of the tokenizer, then of config.json."""
    for owner in (tokenizer, model.config):
        for name in ("bos_token_id", "eos_token_id"):
            found = getattr(owner, name, None)
            if found is not None:
                return int(found[0] if isinstance(found, list) else found)
    raise ConfigError(
        f"model: neither the tokenizer nor config.json of {folder} names a bos or eos id, after which texts are scored: set eos_token_id "
        "in config.json"
    )


def _standard_error(share: float, items: int) -> float:
    """Of the mean of `items` answers that are right or wrong."""
    return math.sqrt(share * (1.0 - share) / (items - 1))


def _missing(error: ImportError) -> ConfigError:
    return ConfigError(
        f"tasks need lm-evaluation-harness ({error}): pip install 'megatron-kd[evaluate]'"
    )
