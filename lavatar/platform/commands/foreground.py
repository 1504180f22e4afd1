"""A job in the foreground, or handed to a cluster: what submit and jobs resume have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lavatar.errors import LavatarError
from lavatar.platform.home import Home
from lavatar.platform.output import answer, answer_json, reserved
from lavatar.platform.titles import title

if TYPE_CHECKING:
    from lavatar.platform.planning import Plan
    from lavatar.platform.registry import Registry
    from lavatar.platform.tables import Subject


def run_plan(
    home: Home,
    registry: Registry,
    plan: Plan,
    people: Sequence[Subject],
    as_json: bool,
    priority: int | None = None,
    *,
    but_cancelled: bool = False,
) -> None:
    """Bring the job of `plan` to its end and answer with its report. Raises what `run_job` raises."""
    from lavatar.platform.report import report, report_text

    with reserved():
        try:
            bring(home, registry, plan, people, priority, but_cancelled=but_cancelled)
        except LavatarError as error:
            if as_json and job_known(registry, plan.job_id):
                answer_json(failed(registry, home, plan.job_id, error))
                error.answered = True  # type: ignore[attr-defined]
            raise
        result = report(registry, home, plan.job_id)
        if as_json:
            answer_json(result)
        else:
            answer(report_text(result))


def bring(
    home: Home,
    registry: Registry,
    plan: Plan,
    people: Sequence[Subject],
    priority: int | None = None,
    *,
    but_cancelled: bool = False,
) -> None:
    """Bring the job of `plan` to its end in this process. Raises what `run_job` raises."""
    from lavatar.platform.execution import Office
    from lavatar.platform.jobs import run_job
    from lavatar.platform.leases import Owner
    from lavatar.platform.progress import open_display
    from lavatar.platform.subjects import require_unchanged

    for subject in people:
        require_unchanged(subject)
    display = open_display()
    backend = plan.recipe.resources.backend

    def open_runner() -> Any:
        from lavatar.cluster.head import address_for
        from lavatar.cluster.stages import StageRunner

        address = address_for(home.root) if backend == "ray" else None
        return StageRunner(home.root, address, backend, dashboard=plan.recipe.resources.dashboard)

    office = Office(home, registry, display, open_runner, Owner.current())
    try:
        display.message(f"job {plan.job_id}: {title(plan.avatar, plan.actor)}, recipe {plan.recipe.name}")
        for text in warm_texts(plan):
            display.message(text)
        run_job(office, plan, priority, but_cancelled=but_cancelled)
    finally:
        display.close()


def failed(registry: Registry, home: Home, job_id: str, error: LavatarError) -> dict[str, Any]:
    """The report of a job that ended with `error`."""
    from lavatar.platform.report import report

    return {**report(registry, home, job_id), "error": {"message": error.message, "hint": error.hint}}


def hand_over(
    home: Home,
    registry: Registry,
    plan: Plan,
    people: Sequence[Subject],
    as_json: bool,
    priority: int | None = None,
) -> None:
    """Give the job of `plan` to the cluster that is up and say where to look for it."""
    from lavatar.platform.detached import detach
    from lavatar.platform.output import note
    from lavatar.platform.subjects import require_unchanged

    for subject in people:
        require_unchanged(subject)
    cluster, name = detach(home, registry, plan, note, priority)
    if as_json:
        answer_json({"job": plan.job_id, "ray_job": name, "address": cluster.address, "dashboard": cluster.dashboard})
    elif name is None:
        answer(f"job {plan.job_id} is running or finished already: lavatar jobs show {plan.job_id}")
    else:
        answer(f"job {plan.job_id} runs on the cluster at {cluster.address}, as {name} on {cluster.dashboard}")
        answer(f"  lavatar jobs logs -f {plan.job_id}, jobs show {plan.job_id}, jobs cancel {plan.job_id}")


def warm_texts(plan: Plan) -> list[str]:
    """Which pairs begin at another one."""
    return [
        f"{pair.avatar.name}<-{pair.actor.name} begins at {pair.warm.name} (--cold: it does not)"
        for pair in plan.pairs
        if pair.warm
    ]


def job_known(registry: Registry, job_id: str) -> bool:
    """Whether the job got as far as the registry."""
    from lavatar.errors import UnknownJobError
    from lavatar.platform.lookup import get_job

    try:
        get_job(registry, job_id)
    except UnknownJobError:
        return False
    return True
