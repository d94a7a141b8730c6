"""Name the Git commit of the code that produced a measurement."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str:
    """Return the Git commit of this checkout.

    The suffix "-dirty" marks a checkout with local changes. The result is "unknown" where Git is
    not installed or the package does not lie in a checkout.
    """
    command = ["git", "-C", str(Path(__file__).parents[2]), "describe", "--always", "--dirty"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return process.stdout.strip() or "unknown"
