"""A job is written down before anything of it runs: by the driver that runs it, and by the client that hands it over.

The client waits for what is imported here, so it is little.
"""

from __future__ import annotations

from collections.abc import Callable

from lavatar.platform import ledger, lookup
from lavatar.platform.belonging import belong
from lavatar.platform.home import Home
from lavatar.platform.planning import Plan, PlannedStage, require_weights, space_needed
from lavatar.platform.registry import Registry
from lavatar.platform.states import State
from lavatar.platform.tracking import experiment_name
from lavatar.platform.uploads import upload


def store_job(
    registry: Registry, home: Home, plan: Plan, warn: Callable[[str], None], priority: int | None = None
) -> list[PlannedStage]:
    """Write the job down; what of it is to do. Raises WeightsError, StorageError for what is missing, before that, and
    StorageError where the registry's results lie in a home that is not this one."""
    keys = [stage.key for stage in plan.stages]
    store = home.store()
    if store is not None:
        store.check()
    belong(registry, home)
    ledger.release_dead(registry)
    for lost in ledger.reopen_lost(registry, home, keys):
        where = "not in the store: it is stored, or" if store else "gone: it is"
        warn(f"the files of {lost.name} are {where} done again")
    done = ledger.finished(registry, home, keys)
    todo = [stage for stage in plan.stages if stage.key not in done]
    if todo:
        require_weights(todo)
        home.require_space(space_needed(todo, plan.people))
        if store is not None:
            for person in plan.people.values():
                upload(registry, store, person.source)
    ledger.store_plan(registry, home, plan, experiment_name(plan.avatar, plan.actor), priority)
    stages = lookup.job_stages(registry, plan.job_id)
    done -= {view.stage.key for view in stages if view.stage.state != State.FINISHED}  # freed while we looked
    return [stage for stage in plan.stages if stage.key not in done]
