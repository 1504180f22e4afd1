"""The registry's tables, made in the database by migrations/ (a test compares the two). Times are Unix seconds."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, Boolean, Float, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from lavatar.platform.states import State
from lavatar.platform.titles import short_title

IMPORTED = "imported"
"""Message of a job that is an imported model."""


class Base(DeclarativeBase):
    """All tables of the registry."""


class Subject(Base):
    """A person: a video file, or the seed of a synthetic head."""

    __tablename__ = "subjects"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    kind: Mapped[str] = mapped_column(String(16))  # video | synthetic
    digest: Mapped[str] = mapped_column(String(80))  # of the video's bytes, or of the seed
    path: Mapped[str | None] = mapped_column(Text)
    synthetic_seed: Mapped[int | None] = mapped_column(Integer)
    size: Mapped[int | None] = mapped_column(BigInteger)  # bytes
    modified_ns: Mapped[int | None] = mapped_column(BigInteger)  # of the file when it was digested
    video: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)  # width, height, fps, frames, duration, …
    created: Mapped[float] = mapped_column(Float)

    def __repr__(self) -> str:
        return f"subject {self.name}"


class Leased:
    """Columns of a row that one process at a time works on (leases.py)."""

    state: Mapped[str] = mapped_column(String(16), default=State.PENDING.value)
    owner: Mapped[str | None] = mapped_column(String(64))
    owner_host: Mapped[str | None] = mapped_column(String(200))
    owner_pid: Mapped[int | None] = mapped_column(Integer)
    owner_started: Mapped[float | None] = mapped_column(Float)  # start of that process: numbers are used again
    lease_until: Mapped[float | None] = mapped_column(Float)
    message: Mapped[str] = mapped_column(Text, default="")
    hint: Mapped[str] = mapped_column(Text, default="")
    mlflow_run_id: Mapped[str | None] = mapped_column(String(64))
    mlflow_open: Mapped[bool] = mapped_column(Boolean, default=False)  # the run was opened and not yet ended
    created: Mapped[float] = mapped_column(Float)
    started: Mapped[float | None] = mapped_column(Float)  # of the latest attempt
    ended: Mapped[float | None] = mapped_column(Float)
    seconds: Mapped[float] = mapped_column(Float, default=0.0)  # worked on, over all attempts


class Stage(Leased, Base):
    """One unit of work, named by the digest of everything its result depends on. Shared by all jobs that need it."""

    __tablename__ = "stages"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    name: Mapped[str] = mapped_column(String(220))
    out_dir: Mapped[str] = mapped_column(Text)
    job_id: Mapped[str | None] = mapped_column(String(32))  # the job that runs it, or ran it last
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    done: Mapped[int | None] = mapped_column(Integer)
    total: Mapped[int | None] = mapped_column(Integer)
    unit: Mapped[str] = mapped_column(String(32), default="")
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    notes: Mapped[list[str]] = mapped_column(JSON, default=list)
    warm: Mapped[str | None] = mapped_column(String(64))  # key of the pair that this pair begins at

    def __repr__(self) -> str:
        return f"stage {self.name} ({self.key[:8]})"


class KnownHome(Base):
    """A home whose results are in the registry (belonging.py)."""

    __tablename__ = "homes"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    host: Mapped[str] = mapped_column(String(200))
    folder: Mapped[str] = mapped_column(Text)
    created: Mapped[float] = mapped_column(Float)

    def __str__(self) -> str:
        return f"{self.folder} on {self.host.partition(' ')[0]}"


class Dataset(Base):
    """A finished preprocessing, as its manifest describes it."""

    __tablename__ = "datasets"

    key: Mapped[str] = mapped_column(ForeignKey("stages.key"), primary_key=True)
    subject: Mapped[str] = mapped_column(String(100))
    folder: Mapped[str] = mapped_column(Text)
    summary: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)  # frames, train, eval, dropped, reprojection_px
    created: Mapped[float] = mapped_column(Float)


class Job(Leased, Base):
    """Avatars driven by actors under a recipe: one of each, or more that share a network. The same make one job."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    avatar: Mapped[str] = mapped_column(String(100))  # for people; JobPair has the names one by one
    actor: Mapped[str] = mapped_column(String(100))
    recipe_name: Mapped[str] = mapped_column(String(32))
    recipe: Mapped[dict[str, Any]] = mapped_column(JSON)
    experiment: Mapped[str] = mapped_column(String(220), default="")
    cancel: Mapped[bool] = mapped_column(Boolean, default=False)  # whoever runs it was asked to stop
    priority: Mapped[int] = mapped_column(Integer, default=0)  # a job of a higher one starts its stages first

    def __repr__(self) -> str:
        return f"job {self.id} ({short_title(self.avatar, self.actor)})"


class JobPair(Base):
    """A pair of a job, and what its names stood for."""

    __tablename__ = "job_pairs"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    avatar: Mapped[str] = mapped_column(String(100), primary_key=True, index=True)
    actor: Mapped[str] = mapped_column(String(100), primary_key=True, index=True)
    avatar_digest: Mapped[str] = mapped_column(String(80))
    actor_digest: Mapped[str] = mapped_column(String(80))


class JobStage(Base):
    """Which stages a job consists of, in order, and how its latest submit came by each."""

    __tablename__ = "job_stages"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    stage_key: Mapped[str] = mapped_column(ForeignKey("stages.key"), primary_key=True, index=True)
    name: Mapped[str] = mapped_column(String(220))  # in this job's words: the subject may have another name there
    position: Mapped[int] = mapped_column(Integer)
    cached: Mapped[bool] = mapped_column(Boolean, default=False)
    seconds: Mapped[float] = mapped_column(Float, default=0.0)


class Artefact(Base):
    """A file that a stage left (path), or a version in the model registry (uri, version): the one made of it, or one
    that has its figures."""

    __tablename__ = "artefacts"
    __table_args__ = (UniqueConstraint("stage_key", "kind", "name"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    stage_key: Mapped[str] = mapped_column(ForeignKey("stages.key"), index=True)
    kind: Mapped[str] = mapped_column(String(16))  # file | model | figures
    name: Mapped[str] = mapped_column(String(220), index=True)
    path: Mapped[str | None] = mapped_column(Text)  # relative when inside the home
    uri: Mapped[str | None] = mapped_column(Text)  # of the model registry
    version: Mapped[int | None] = mapped_column(Integer)
    created: Mapped[float] = mapped_column(Float)


class Event(Base):
    """Something that happened, for `lavatar jobs logs`."""

    __tablename__ = "events"
    __table_args__ = (Index("ix_events_job", "job_id", "id"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    time: Mapped[float] = mapped_column(Float)
    job_id: Mapped[str | None] = mapped_column(String(32))
    stage_key: Mapped[str | None] = mapped_column(String(64))
    stage: Mapped[str] = mapped_column(String(220), default="")
    level: Mapped[str] = mapped_column(String(16), default="info")
    text: Mapped[str] = mapped_column(Text)
