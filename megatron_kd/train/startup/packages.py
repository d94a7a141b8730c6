"""Packages that a run needs and that are not there: found at the start, where a worker would miss one after an hour, or hang."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec

from megatron_kd.config import ConfigError

_NAMES = {"megatron-core": "megatron.core"}


def check_packages() -> None:
    """ConfigError naming all that this package requires and that cannot be imported. Optional parts are not asked for."""
    try:
        wanted = [text for text in requires("megatron-kd") or () if "extra ==" not in text]
    except PackageNotFoundError:  # run from a source tree that is not installed
        return
    names = [re.split(r"[^A-Za-z0-9._-]", text, maxsplit=1)[0] for text in wanted]
    missing = [name for name in names if not _importable(_NAMES.get(name, name.replace("-", "_")))]
    if missing:
        raise ConfigError(
            f"not installed here: {', '.join(missing)}: pip install {' '.join(missing)}, in every environment that ranks run in"
        )


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
