"""What the registry tells of jobs, their stages and what they made. Nothing here changes it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, literal, or_, select
from sqlalchemy.orm import aliased

from lavatar.contracts import StageKind
from lavatar.platform.ids import by_id
from lavatar.platform.registry import Registry, database_now, patiently
from lavatar.platform.states import State
from lavatar.platform.tables import Artefact, Dataset, Event, Job, JobPair, JobStage, Stage


@dataclass(frozen=True)
class StageView:
    """A stage as one job sees it."""

    name: str
    cached: bool
    job_seconds: float
    stage: Stage


@patiently
def time_of(registry: Registry) -> float:
    """Unix seconds by the database's clock, which is that of the leases."""
    with registry.read() as session:
        return database_now(session)


@patiently
def get_stage(registry: Registry, key: str) -> Stage | None:
    with registry.read() as session:
        return session.get(Stage, key)


@patiently
def get_stages(registry: Registry, keys: Collection[str]) -> Sequence[Stage]:
    """Those of them that there are."""
    with registry.read() as session:
        return session.scalars(select(Stage).where(Stage.key.in_(list(keys)))).all()


def get_job(registry: Registry, job_id: str) -> Job:
    """The job of that id, or of the only id that begins so. Raises UnknownJobError."""
    return by_id(job_id, jobs_beginning(registry, job_id), "job", "Look them up with: lavatar jobs list")


@patiently
def jobs_beginning(registry: Registry, text: str) -> list[tuple[str, Job]]:
    """Jobs by their ids, those that may begin so."""
    if not text.isascii():  # a database takes no text that is none
        return []
    with registry.read() as session:
        begun = session.scalars(select(Job).where(Job.id.startswith(text, autoescape=True)).order_by(Job.id))
        return [(job.id, job) for job in begun]


@patiently
def list_jobs(registry: Registry) -> list[Job]:
    """Newest first."""
    with registry.read() as session:
        return list(session.scalars(select(Job).order_by(Job.created.desc(), Job.id)))


@patiently
def job_stages(registry: Registry, job_id: str) -> list[StageView]:
    """The job's stages in order."""
    with registry.read() as session:
        rows = session.execute(
            select(JobStage, Stage).join(Stage, Stage.key == JobStage.stage_key).where(JobStage.job_id == job_id)
            .order_by(JobStage.position)
        )  # fmt: skip
        return [StageView(link.name, link.cached, link.seconds, stage) for link, stage in rows]


@patiently
def job_pairs(registry: Registry, job_id: str) -> list[JobPair]:
    """The job's pairs by name."""
    with registry.read() as session:
        chosen = select(JobPair).where(JobPair.job_id == job_id)
        return list(session.scalars(chosen.order_by(JobPair.avatar, JobPair.actor)))


@patiently
def artefacts(registry: Registry, keys: Collection[str], kind: str) -> list[Artefact]:
    """What these stages left, in the order it was stored."""
    with registry.read() as session:
        chosen = select(Artefact).where(Artefact.stage_key.in_(list(keys)), Artefact.kind == kind)
        return list(session.scalars(chosen.order_by(Artefact.id)))


@patiently
def events(registry: Registry, job_id: str, after: int = 0) -> list[Event]:
    with registry.read() as session:
        return list(session.scalars(select(Event).where(Event.job_id == job_id, Event.id > after).order_by(Event.id)))


def stage_name(kind: StageKind, pair: type[JobPair]) -> ColumnElement[str]:
    """What the stage of that kind of a pair is called in its job."""
    of_both = kind in (StageKind.PAIR, StageKind.PREVIEW)
    return literal(f"{kind.value}:") + pair.avatar + ("<-" + pair.actor if of_both else "")


@patiently
def latest_stages(
    registry: Registry,
    kinds: Sequence[StageKind],
    avatar: str,
    actor: str | None,
    digests: Mapping[str, str | None],
) -> Sequence[Stage]:
    """Finished stages of those kinds in jobs with a pair of these names, newest first.

    `digests` holds what the names stand for today (None: the subject was removed; then any job of that name counts).
    """
    query = select(Stage).join(JobStage, JobStage.stage_key == Stage.key)
    query = query.join(JobPair, JobPair.job_id == JobStage.job_id)
    same = aliased(JobPair)  # a stage has one name in a job, where one video may have several
    query = query.join(same, and_(same.job_id == JobPair.job_id, same.avatar_digest == JobPair.avatar_digest))
    heads = JobStage.name == stage_name(StageKind.AVATAR, same)
    bridges = and_(JobStage.name == stage_name(StageKind.PAIR, same), same.actor_digest == JobPair.actor_digest)
    own = or_(heads, bridges, Stage.kind == StageKind.SHARED.value)  # a job may have other avatars and pairs too
    query = query.where(Stage.kind.in_([kind.value for kind in kinds]), Stage.state == State.FINISHED.value)
    query = query.where(JobPair.avatar == avatar, own)
    if digests.get(avatar):
        query = query.where(JobPair.avatar_digest == digests[avatar])
    if actor is not None:
        query = query.where(JobPair.actor == actor)
        if digests.get(actor):
            query = query.where(JobPair.actor_digest == digests[actor])
    with registry.read() as session:
        found = session.scalars(query.order_by(Stage.ended.desc(), Stage.key)).all()
    return list({stage.key: stage for stage in found}.values())


@patiently
def job_of(registry: Registry, key: str, avatar: str, actor: str | None, job_id: str | None = None) -> Job | None:
    """The newest job of these names that contains the stage; with `job_id` that one or none."""
    query = select(Job).join(JobStage, JobStage.job_id == Job.id).join(JobPair, JobPair.job_id == Job.id)
    query = query.where(JobStage.stage_key == key, JobPair.avatar == avatar)
    if actor is not None:
        query = query.where(JobPair.actor == actor)
    if job_id is not None:
        query = query.where(Job.id == job_id)
    with registry.read() as session:
        return session.scalars(query.order_by(Job.created.desc(), Job.id)).first()


@patiently
def names_known(registry: Registry, name: str) -> bool:
    """Whether a job ever had a subject of that name."""
    with registry.read() as session:
        named = select(JobPair.job_id).where(or_(JobPair.avatar == name, JobPair.actor == name))
        return session.scalars(named).first() is not None


@patiently
def dataset_summaries(registry: Registry, keys: Collection[str]) -> dict[str, dict[str, Any]]:
    """What the manifests of these datasets say, as far as they are finished."""
    with registry.read() as session:
        rows = session.scalars(select(Dataset).where(Dataset.key.in_(list(keys))))
        return {row.key: dict(row.summary) for row in rows}


@patiently
def list_datasets(registry: Registry, subject: str) -> list[Dataset]:
    """What was made of a subject's video, newest first."""
    with registry.read() as session:
        return list(
            session.scalars(
                select(Dataset).where(Dataset.subject == subject).order_by(Dataset.created.desc(), Dataset.key)
            )
        )
