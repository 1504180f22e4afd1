"""What `lavatar doctor` finds wrong in a home, and what mending it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lavatar.errors import LavatarError
from lavatar.platform.home import Home
from lavatar.platform.registry import Registry
from lavatar.platform.usage import Usage, undisturbed


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: what it is, where, and what mending it does. `mend` is None where it is not ours to mend
    now; `mending` then says what to do instead."""

    what: str
    where: str
    mending: str
    mend: Callable[[], object] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Outcome:
    """A finding, whether it is mended now, and where that failed why."""

    finding: Finding
    mended: bool = False
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        found = self.finding
        return {
            "what": found.what,
            "where": found.where,
            "mending": found.mending,
            "mended": self.mended,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Place:
    """A home that is examined, and who used what of it when that began."""

    home: Home
    registry: Registry
    usage: Usage

    def finding(self, key: str | None, what: str, where: Path, mending: str, mend: Callable[[], object]) -> Finding:
        """Something wrong with files of the stage `key`, or with others. While they are used they are left alone."""
        user = self.usage.user_of(key)
        if user is not None:
            return Finding(what, str(where), f"{user} uses it: mend it when that has ended")

        def safely() -> None:
            with undisturbed(self.home, self.registry) as usage:
                usage.require_free(key)
                mend()

        return Finding(what, str(where), mending, safely)


def mended(finding: Finding) -> Outcome:
    """The finding after its mending was tried."""
    if finding.mend is None:
        return Outcome(finding)
    try:
        finding.mend()
    except LavatarError as error:
        return Outcome(finding, reason=error.message)
    except OSError as error:
        return Outcome(finding, reason=f"{error.filename or finding.where}: {error.strerror or error}")
    return Outcome(finding, mended=True)
