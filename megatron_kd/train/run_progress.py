"""How far a run is: counters only, everything else follows from them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RunProgress:
    """step: finished updates, skipped ones included. consumed_*: sequences and tokens read. nonfinite_steps: of these, skipped."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    nonfinite_steps: int = 0

    def advance(self, *, samples: int, tokens: int, updated: bool) -> None:
        """One more step over `samples` sequences."""
        self.step += 1
        self.consumed_samples += samples
        self.consumed_tokens += tokens
        self.nonfinite_steps += not updated
