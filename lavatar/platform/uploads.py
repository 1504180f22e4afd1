"""Videos of people in the store, where nodes that lack them fetch them from: which of them this registry put there.

Another registry may use the same store: what it put there is its own. So each upload is remembered, before it is made,
as an event of no job that has the video's digest in the place of a stage's key.
"""

from __future__ import annotations

from sqlalchemy import delete, exists, or_, select
from sqlalchemy.orm import Session

from lavatar.cluster.store import Store
from lavatar.contracts import VideoSource
from lavatar.platform import ledger
from lavatar.platform.registry import Registry
from lavatar.platform.tables import Event, JobPair, Subject

_MARK = "video"  # Event.stage of an upload
_OURS = (Event.job_id.is_(None), Event.stage == _MARK)


def upload(registry: Registry, store: Store, source: VideoSource) -> None:
    """The source's file is in the store. Raises StorageError."""
    if store.lacks_video(source):
        ledger.record(registry, None, f"the video of {source.name} is stored", key=source.digest, stage=_MARK)
        store.keep_video(source)


def uploaded(session: Session) -> set[str]:
    """Digests of the videos that this registry's jobs stored."""
    return {digest for digest in session.scalars(select(Event.stage_key).where(*_OURS)) if digest}


def forget(session: Session, digest: str) -> None:
    """The video is in the store no more."""
    session.execute(delete(Event).where(*_OURS, Event.stage_key == digest))


def named(session: Session, digest: str) -> bool:
    """Whether a person or a job has this video."""
    pair = or_(JobPair.avatar_digest == digest, JobPair.actor_digest == digest)
    return bool(session.scalar(select(exists().where(Subject.digest == digest) | exists().where(pair))))
