"""Which code a measurement is of."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str:
    """Of this checkout, "-dirty" where files differ from it; "unknown" where there is no git or no checkout."""
    command = ["git", "-C", str(Path(__file__).parents[2]), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"
