"""Things by the ids that people type: jobs, runs, sweeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from lavatar.errors import UnknownJobError

T = TypeVar("T")
_MOST_NAMED = 8


def by_id(
    text: str, things: Iterable[tuple[str, T]], what: str, hint: str, title: Callable[[str, T], str] | None = None
) -> T:
    """The thing whose id is `text`, else the only one whose id begins so; of no text, which begins them all, none.

    Raises UnknownJobError, with `hint` where there is none, where there are several with their ids (or `title`s).
    """
    found = [(own, thing) for own, thing in things if text and own.startswith(text)]
    chosen = [(own, thing) for own, thing in found if own == text] or found
    if len(chosen) == 1:
        return chosen[0][1]
    if not chosen:
        raise UnknownJobError(f"there is no {what} {text!r:.80}", hint)
    titles = [title(own, thing) if title else own for own, thing in chosen]
    more = ", …" if len(titles) > _MOST_NAMED else ""
    named = ", ".join(titles[:_MOST_NAMED]) + more
    raise UnknownJobError(f"{text!r} begins the ids of {len(titles)}: {named}", f"Write more of the {what}'s id.")
