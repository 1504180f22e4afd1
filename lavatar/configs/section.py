"""The base of every configuration section."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MOST = 8192
"""Of any size or width of a model: more is a slip, or a release made to fill the memory."""

Widths = Annotated[tuple[Annotated[int, Field(ge=1, le=MOST)], ...], Field(max_length=16)]
"""Of layers, one after the other."""


class Section(BaseModel):
    """Frozen, and an unknown key is an error: a misspelt knob must never be ignored. No number is infinite or none."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
