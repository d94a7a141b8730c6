"""A clock for tests."""

from __future__ import annotations


class Clock:
    """Show the time that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now
