"""JSON files that others wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_kd.config.run_config import ConfigError


def read_json(path: Path, *, what: str) -> dict[str, Any]:
    """A JSON object. ConfigError naming `what` where the file is missing or is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError:
        raise ConfigError(f"{what}: {path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{what}: {path} cannot be read as JSON ({error})") from error
    return content
