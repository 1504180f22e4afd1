"""Everything that a crash or a bad disk can leave in a home: found, and mended if that is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from lavatar.cluster.environment import this_host
from lavatar.contracts import EventSink
from lavatar.errors import LavatarError
from lavatar.platform import belonging, ledger, lookup
from lavatar.platform.belonging import strangers
from lavatar.platform.damage import damaged
from lavatar.platform.detached import stranded
from lavatar.platform.findings import Finding, Outcome, Place, mended
from lavatar.platform.home import Home
from lavatar.platform.leftovers import abandoned, half_written
from lavatar.platform.registry import Registry, open_registry
from lavatar.platform.runs import unended
from lavatar.platform.unsent import unsent
from lavatar.platform.usage import usage_of


def inspect(home: Home, events: EventSink, *, repair: bool, adopt: bool = False) -> Iterator[Outcome]:
    """What is wrong, thing by thing; mended where `repair` and where no living process uses it.

    `adopt`: other homes that the registry speaks of are lost, and what is not in this one may be made again.
    """
    registry = open_registry(home)
    place = Place(home, registry, usage_of(home, registry))
    searches: tuple[Callable[[], Iterator[Finding]], ...] = (
        partial(other_homes, place, adopt),
        partial(stale_leases, registry),
        partial(stranded_jobs, home, registry),
        partial(half_written, place),
        partial(damaged, place, events),
        partial(abandoned, place),
        partial(unended, home, registry),
        partial(unsent, place),
    )
    for search in searches:
        for finding in list(search()):
            yield mended(finding) if repair else Outcome(finding)


def other_homes(place: Place, adopt: bool) -> Iterator[Finding]:
    """Homes whose results are in the registry and not here."""
    for other in strangers(place.registry, place.home):
        what = f"the registry's results lie in {other}, which this home shares neither disk nor store with"
        if adopt:
            mending = "that home counts as lost: what is not in this one is made again when it is needed"
            yield Finding(what, "registry", mending, partial(belonging.adopt, place.registry, place.home))
        else:
            mending = "set LAVATAR_HOME to it, or LAVATAR_STORE on all; if it is lost: lavatar doctor --repair --adopt"
            yield Finding(what, "registry", mending)


def stale_leases(registry: Registry) -> Iterator[Finding]:
    """Stages and jobs that a dead process left running."""
    for row in ledger.dead(registry):
        host = (row.owner_host or "").split(" ")[0]
        gone = "is gone" if row.owner_host == this_host() else "gives no sign of life"
        yield Finding(
            f"{row!r} is running, and process {row.owner_pid} on {host} that ran it {gone}",
            "registry",
            "it becomes interrupted: submit or resume goes on from its checkpoint",
            partial(ledger.release_dead, registry),
        )


def stranded_jobs(home: Home, registry: Registry) -> Iterator[Finding]:
    """Jobs that were handed to a cluster that will not begin with them."""
    for job in lookup.list_jobs(registry):
        try:
            reason = stranded(home, registry, job.id)
        except LavatarError:  # a cluster that does not answer may still begin
            continue
        if reason:
            what, mend = f"{job!r} is pending, and {reason}", partial(ledger.strand_job, registry, job.id, reason)
            yield Finding(what, "registry", f"it becomes interrupted: lavatar jobs resume {job.id}", mend)
