"""Read JSON files that other programs wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_kd.config import ConfigError


def read_json(path: Path, *, setting: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ConfigError: the file is missing or holds no JSON object. The message begins with `what`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError:
        raise ConfigError(f"{setting}: {path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{setting}: {path} cannot be read as JSON ({error})") from error
    return content
