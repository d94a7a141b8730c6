"""Build the keys of `[distill]` that choose a divergence from its declarations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, create_model

from megatron_kd.config.declarations.divergences import (
    DIVERGENCES,
    PARAMETERS,
    DivergenceName,
    Parameter,
    describe_divergences,
)
from megatron_kd.config.sections.section import Section


def _field(parameter: Parameter) -> tuple[type, Any]:
    return float, Field(
        default=parameter.default,
        gt=parameter.gt,
        ge=parameter.ge,
        lt=parameter.lt,
        description=parameter.description,
    )


if TYPE_CHECKING:

    class DivergenceSection(Section):
        """Hold the divergence; each of its parameters is an attribute of that name."""

        divergence: str = "forward_kl"

else:
    DivergenceSection = create_model(
        "DivergenceSection",
        __base__=Section,
        divergence=(
            DivergenceName,
            Field(
                default="forward_kl",
                description="Divergence of teacher and student (formulas: "
                "config/declarations/divergences.py). "
                f"{describe_divergences()}. All but forward_kl take tail bucket, some of them "
                "renormalize; mse_logits needs dense.",
            ),
        ),
        **{name: _field(parameter) for name, parameter in PARAMETERS.items()},
    )


def divergence_parameters(section: DivergenceSection) -> dict[str, float]:
    """Return the value of each parameter of the chosen divergence."""
    declared = DIVERGENCES[section.divergence].parameters
    return {parameter.name: getattr(section, parameter.name) for parameter in declared}
