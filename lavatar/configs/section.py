"""The base of every configuration section."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen, and an unknown key is an error: a misspelt knob must never be ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")
