"""Run lm-evaluation-harness on an exported model and local task files."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_kd.config import ConfigError
from megatron_kd.models.huggingface.transformers_model import load_causal_lm, load_text_tokenizer

_REQUIRED_KEYS = ("task", "data_file", "output_type", "doc_to_text")
_REMOTE_KEYS = (
    "dataset_path",
    "dataset_name",
    "dataset_kwargs",
    "custom_dataset",
    "include",
    "unsafe_code",
)


@dataclass(frozen=True)
class TaskOptions:
    """Set how tasks are run.

    Attributes:
        limit: Number of items of each task; None for all.
        batch_size: Requests of one forward pass.
        device: "cpu", "cuda" or "cuda:N".
        max_length: Tokens of the longest input; older ones are cut off. None: as config.json says.
    """

    limit: int | None
    batch_size: int
    device: str
    max_length: int | None = None


def read_task(path: Path, data_folder: Path) -> dict[str, Any]:
    """Read a task file as a task configuration of lm-evaluation-harness.

    Its data are the local JSON lines of `data_file` in `data_folder`. The file is plain YAML: tags
    that would call Python are an error, and so is a remote data set.

    Raises:
        ConfigError: The file or its data cannot be read, or a key is missing or not allowed.
    """
    try:
        import yaml
    except ImportError as error:
        raise _not_installed(error) from None
    try:
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(
            f"--task {path} cannot be read ({' '.join(str(error).split())[:200]})"
        ) from error
    missing = [name for name in _REQUIRED_KEYS if not isinstance(task, dict) or name not in task]
    if missing:
        raise ConfigError(
            f"--task {path} lacks {missing[0]}: see examples/evaluation for a complete one"
        )
    remote = [name for name in _REMOTE_KEYS if name in task]
    if remote:
        raise ConfigError(f"--task {path} sets {remote[0]}: data comes from data_file alone")
    data = data_folder / str(task.pop("data_file"))
    if not data.is_file():
        raise ConfigError(
            f"--task {path}: its data {data} does not exist: name its folder with --data-folder"
        )
    return {
        **task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
    }


def run_tasks(
    folder: Path, tasks: list[dict[str, Any]], options: TaskOptions
) -> dict[str, dict[str, float]]:
    """Run tasks on an exported model. Nothing is downloaded.

    Args:
        folder: Hugging Face folder of the model and its tokenizer.
        tasks: Task configurations of `read_task`.
        options: How they are run.

    Returns:
        Task -> metric -> value. Accuracies have a standard error (name + "_stderr"); `items` is the
        number of items.
    """
    lm_eval = _import_harness()
    model = _load_model(folder, options)
    try:
        evaluation = lm_eval.simple_evaluate(
            model,
            tasks=list(tasks),
            limit=options.limit,
            task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
            bootstrap_iters=0,
            log_samples=False,
        )
    except AssertionError as error:
        # The harness shortens contexts, but not answers.
        raise ConfigError(
            f"an answer is longer than the model's {model.max_length} positions: set --max-length"
        ) from error
    return {
        name: _with_errors(metrics, evaluation["n-samples"][name]["effective"])
        for name, metrics in evaluation["results"].items()
    }


def _import_harness() -> Any:
    """Import lm-evaluation-harness with all that it needs for a Hugging Face model."""
    # The libraries read them when they are imported.
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    try:
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise _not_installed(error) from error
    return lm_eval


def _load_model(folder: Path, options: TaskOptions) -> Any:
    """Load a model and its tokenizer for the harness."""
    from lm_eval.models.huggingface import HFLM

    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    model = load_causal_lm(folder, dtype, setting="model").to(options.device)
    tokenizer = load_text_tokenizer(folder, setting="model")
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=options.batch_size,
        device=options.device,
        max_length=options.max_length,
        prefix_token_id=_start_id(model, tokenizer, folder),
    )


def _with_errors(metrics: dict[str, Any], items: int) -> dict[str, float]:
    """Return the finite numbers of a task by name, standard errors of accuracies, and `items`."""
    numbers = {
        key.partition(",")[0]: value
        for key, value in metrics.items()
        if isinstance(value, float) and value == value
    }
    errors = {
        f"{key}_stderr": _standard_error(value, items)
        for key, value in numbers.items()
        if key.startswith("acc") and items > 1
    }
    return {**numbers, **errors, "items": items}


def _start_id(model: Any, tokenizer: Any, folder: Path) -> int:
    """Return the id that stands before a text without context.

    It is the first known of bos and eos of the tokenizer, then of config.json.
    """
    for source in (tokenizer, model.config):
        for name in ("bos_token_id", "eos_token_id"):
            token_id = getattr(source, name, None)
            if token_id is not None:
                return int(token_id[0] if isinstance(token_id, list) else token_id)
    raise ConfigError(
        f"model: neither the tokenizer nor config.json of {folder} names a bos or eos id, after "
        "which texts are scored: set eos_token_id in config.json"
    )


def _standard_error(share: float, items: int) -> float:
    """Return the standard error of the share of correct answers among `items`."""
    return math.sqrt(share * (1.0 - share) / (items - 1))


def _not_installed(error: ImportError) -> ConfigError:
    return ConfigError(
        f"tasks need lm-evaluation-harness ({error}): pip install 'megatron-kd[evaluate]'"
    )
