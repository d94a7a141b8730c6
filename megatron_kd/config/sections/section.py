"""Define the base class of the sections of a run file."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Hold the keys of one table of a run file: frozen, and an unknown key is an error.

    The message of a section's own check begins with the name of a field, so that the loader can
    put the section's name in front of it. The docstring below a field describes its key in
    `--help` and in the documentation.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Join the lines of the fields' docstrings, which are the descriptions of the keys."""
        for field in cls.model_fields.values():
            if field.description is not None:
                field.description = " ".join(field.description.split())
