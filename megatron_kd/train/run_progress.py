"""Count the progress of a run. Everything that depends on it follows from these counters."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RunProgress:
    """Count steps, samples and tokens.

    Attributes:
        step: Finished updates, including skipped ones.
        consumed_samples: Sequences read.
        consumed_tokens: Tokens read.
        nonfinite_steps: Updates that were skipped because a number was not finite.
    """

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    nonfinite_steps: int = 0

    def advance(self, *, samples: int, tokens: int, updated: bool) -> None:
        """Count one more step.

        Args:
            samples: Sequences of the step.
            tokens: Tokens of the step.
            updated: False if the update was skipped.
        """
        self.step += 1
        self.consumed_samples += samples
        self.consumed_tokens += tokens
        self.nonfinite_steps += not updated
