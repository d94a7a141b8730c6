"""Describe one run completely: its sections and the relations between them."""

from __future__ import annotations

from pydantic import model_validator

from megatron_kd.config.relations import relation_problems
from megatron_kd.config.run_sections import RunSections


class RunConfig(RunSections):
    """Describe one run; the program writes it to run.directory/config.toml."""

    @model_validator(mode="after")
    def _check_relations(self) -> RunConfig:
        problems = relation_problems(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self
