"""Define the base class of the sections of a run file."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Hold the keys of one table of a run file: frozen, and an unknown key is an error.

    The message of a section's own check begins with the name of a field, so that the loader can
    put the section's name in front of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
