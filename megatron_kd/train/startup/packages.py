"""Check at the start that all required packages are installed.

Otherwise a worker would fail, or hang, at the first import after an hour.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec

from megatron_kd.config import ConfigError

# Packages whose module has a name that does not follow from the package's.
_MODULES = {"megatron-core": "megatron.core"}


def check_packages() -> None:
    """Raise ConfigError that names all required packages that are missing.

    Packages of optional features are not checked.
    """
    try:
        requirements = [text for text in requires("megatron-kd") or () if "extra ==" not in text]
    except PackageNotFoundError:  # a source tree that is not installed
        return
    names = [re.split(r"[^A-Za-z0-9._-]", text, maxsplit=1)[0] for text in requirements]
    missing = [
        name for name in names if not _is_importable(_MODULES.get(name, name.replace("-", "_")))
    ]
    if missing:
        raise ConfigError(
            f"not installed here: {', '.join(missing)}: pip install {' '.join(missing)}, in every "
            "environment that ranks run in"
        )


def _is_importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
