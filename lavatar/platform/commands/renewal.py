"""lavatar jobs retry --stale: the jobs that bring pairs up to date whose avatar was retrained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lavatar.errors import Interrupted, JobError, LavatarError
from lavatar.platform.commands.foreground import bring, failed, job_known, warm_texts
from lavatar.platform.home import Home
from lavatar.platform.output import answer, answer_json, note, reserved

if TYPE_CHECKING:
    from lavatar.platform.registry import Registry
    from lavatar.platform.stale import Renewal


def renew(as_json: bool, *, detach: bool) -> None:
    """All of them, one after the other, and one answer. Raises JobError where a pair stays stale."""
    from lavatar.platform.catalogue import Catalogue
    from lavatar.platform.registry import open_registry
    from lavatar.platform.stale import renewals
    from lavatar.platform.tracking import connect

    home = Home.from_environment()
    registry = open_registry(home)
    found = renewals(home, registry, Catalogue(connect(home)))
    for pair, reason in found.left.items():
        note(f"{pair} stays stale: {reason}")
    errors: list[LavatarError] = []
    with reserved():
        results = [_one(home, registry, renewal, errors, detach=detach) for renewal in found.jobs]
        if as_json:
            answer_json({"jobs": results, "left": found.left})
        elif not results and not found.left:
            answer("no pair is stale")
        elif not as_json:
            for result in results:
                answer(f"job {result['job']} {result['state']}: {result['avatar']} driven by {result['actor']}")
    if errors or found.left:
        wrong = [f"{len(errors)} of {len(results)} jobs failed"] if errors else []
        wrong += [f"{len(found.left)} pairs stay stale"] if found.left else []
        error = JobError(" and ".join(wrong), errors[0].message if errors else "See above for the reasons.")
        error.answered = True  # type: ignore[attr-defined]
        raise error


def _one(
    home: Home, registry: Registry, renewal: Renewal, errors: list[LavatarError], *, detach: bool
) -> dict[str, Any]:
    """The report of one job. What it raises is added to `errors`, but for a stop."""
    from lavatar.platform.detached import detach as hand_over
    from lavatar.platform.report import report
    from lavatar.platform.subjects import require_unchanged

    plan = renewal.plan
    for text in warm_texts(plan) if detach else ():
        note(text)
    try:
        if detach:
            for subject in renewal.people:
                require_unchanged(subject)
            hand_over(home, registry, plan, note)
        else:
            bring(home, registry, plan, renewal.people)
    except Interrupted:
        raise
    except LavatarError as error:
        errors.append(error)
        note(f"job {plan.job_id}: {error}")
        if job_known(registry, plan.job_id):
            return failed(registry, home, plan.job_id, error)
        return {"job": plan.job_id, "state": "failed", "avatar": plan.avatar, "actor": plan.actor,
                "error": {"message": error.message, "hint": error.hint}}  # fmt: skip
    return report(registry, home, plan.job_id)
