"""What jobs are called for people: after the avatar and who drives it, if anybody does."""

from __future__ import annotations

NOBODY = "-"
"""Stands for the actor in the registry where a job has none: it makes what the trials of an avatar's sweep need."""


def actor_or_none(actor: str) -> str | None:
    """The actor of a job as the registry has it."""
    return None if actor == NOBODY else actor


def title(avatar: str, actor: str | None) -> str:
    """ "anna driven by boris", or "avatar anna"."""
    return f"avatar {avatar}" if actor in (None, NOBODY) else f"{avatar} driven by {actor}"


def short_title(avatar: str, actor: str | None, arrow: str = " <- ") -> str:
    """ "anna <- boris", or "anna"."""
    return avatar if actor in (None, NOBODY) else f"{avatar}{arrow}{actor}"
