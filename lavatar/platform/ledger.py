"""Stages and jobs in the registry: claiming them, ending them, and what they left. One function, one transaction, which
may be done twice (see `patiently`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Update, delete, select, update
from sqlalchemy.orm import Session

from lavatar.cluster.results import whole
from lavatar.contracts import StageKind, StageResult, StageSpec
from lavatar.errors import Cancelled, LavatarError, UnknownJobError
from lavatar.masking import masked
from lavatar.platform import leases
from lavatar.platform.home import Home
from lavatar.platform.jsonable import plain
from lavatar.platform.leases import Owner
from lavatar.platform.planning import Plan
from lavatar.platform.registry import Registry, hold_stages, insert_missing, now, patiently
from lavatar.platform.states import State, move
from lavatar.platform.tables import Artefact, Dataset, Event, Job, JobPair, JobStage, Stage

_TRAINED = (StageKind.AVATAR, StageKind.PAIR, StageKind.SHARED)
_MARKERS = {StageKind.PREPROCESS: "manifest.json", **dict.fromkeys(_TRAINED, "release")}


@patiently
def store_plan(registry: Registry, home: Home, plan: Plan, experiment: str, priority: int | None = None) -> None:
    """Write the job and its stages down, leaving what is there already. `priority` None: as it was, 0 at first."""
    with registry.write() as session:
        hold_stages(session)
        job = {
            "id": plan.job_id,
            "avatar": plan.avatar,
            "actor": plan.actor,
            "recipe_name": plan.recipe.name,
            "recipe": plan.recipe.model_dump(mode="json"),
            "experiment": experiment,
            "created": now(),
        }
        insert_missing(session, Job, [job])
        today = {"recipe": job["recipe"]} | ({} if priority is None else {"priority": priority})
        session.execute(update(Job).where(Job.id == plan.job_id).values(**today))
        pairs = [
            {
                "job_id": plan.job_id,
                "avatar": pair.avatar.name,
                "actor": pair.actor.name,
                "avatar_digest": pair.avatar.digest,
                "actor_digest": pair.actor.digest,
            }
            for pair in plan.pairs
        ]
        insert_missing(session, JobPair, pairs)
        insert_missing(session, Stage, [_stage_row(home, s.spec) for s in plan.stages])
        starts = {pair.bridge.key: pair.warm.key for pair in plan.pairs if pair.warm}
        if starts:
            session.execute(update(Stage), [{"key": key, "warm": warm} for key, warm in starts.items()])
        rows = [
            {"job_id": plan.job_id, "stage_key": s.key, "name": s.name, "position": i}
            for i, s in enumerate(plan.stages)
        ]
        insert_missing(session, JobStage, rows)


def _stage_row(home: Home, spec: StageSpec) -> dict[str, Any]:
    return {
        "key": spec.key,
        "kind": spec.kind.value,
        "name": spec.name,
        "out_dir": home.relative(spec.out_dir),
        "created": now(),
    }


@patiently
def claim_job(registry: Registry, job_id: str, owner: Owner, *, but_cancelled: bool = False) -> Job:
    """Make `owner` the one that runs the job. StageBusyError while another living process does; Cancelled for a job
    that was cancelled, where those are not to be taken up (`but_cancelled`)."""
    with registry.write() as session:
        job = _job(session, job_id)
        if job.state == State.CANCELLED and but_cancelled:
            raise Cancelled(f"job {job_id} was cancelled", f"Take it up again: lavatar jobs resume {job_id}")
        if job.state == State.FINISHED:
            move(job, State.PENDING)
        if job.owner != owner.id:  # else this is done again, and it may have been asked to stop since
            job.cancel = False
        leases.claim(job, owner, job_id)
        return job


@patiently
def cancel_job(registry: Registry, job_id: str) -> State:
    """Its state afterwards: still running where its process was asked to stop, cancelled where none runs it.

    A job that is finished or cancelled stays so.
    """
    with registry.write() as session:
        job = _job(session, job_id)
        if job.state == State.RUNNING and not leases.owner_alive(job):
            leases.abandon(job)
        if job.state == State.RUNNING:
            job.cancel = True
        elif job.state not in (State.FINISHED, State.CANCELLED):
            move(job, State.CANCELLED)
            job.message, job.hint = "cancelled", f"Take it up again: lavatar jobs resume {job.id}"
        return State(job.state)


@patiently
def reopen_job(registry: Registry, job_id: str) -> None:
    """A job that ended, however it did, is wanted again."""
    with registry.write() as session:
        job = _job(session, job_id)
        if job.state != State.PENDING:
            move(job, State.PENDING)
            job.message = job.hint = ""


def strand_job(registry: Registry, job_id: str, message: str) -> None:
    """A job that is still pending will not be begun by the cluster that it was handed to."""
    with registry.write() as session:
        job = _job(session, job_id)
        if job.state == State.PENDING:
            move(job, State.INTERRUPTED)
            job.message, job.hint = message, f"Take it up: lavatar jobs resume {job_id}"


def cancel_asked(session: Session, owner: Owner) -> bool:
    """Whether the job that `owner` runs was asked to stop."""
    asked = select(Job.id).where(Job.owner == owner.id, Job.state == State.RUNNING.value, Job.cancel.is_(True))
    return session.scalars(asked).first() is not None


@patiently
def claim_stage(registry: Registry, key: str, owner: Owner, job_id: str) -> Stage:
    """Make `owner` the one that runs the stage, or return it finished. StageBusyError while another process runs it."""
    with registry.write() as session:
        stage = _stage(session, key)
        if stage.state != State.FINISHED:
            leases.claim(stage, owner, job_id)
        return stage


@patiently
def end_job(registry: Registry, job_id: str, owner: Owner, to: State, message: str = "", hint: str = "") -> None:
    """The job's attempt by `owner` ends; nothing happens if the job was taken over meanwhile."""
    with registry.write() as session:
        job = _job(session, job_id)
        if job.owner == owner.id:
            leases.release(job, to, message, hint)


@patiently
def end_stage(registry: Registry, key: str, owner: Owner, to: State, message: str = "", hint: str = "") -> bool:
    """A stage's attempt by `owner` ends without a result. False, and nothing happens, if it was taken over."""
    with registry.write() as session:
        stage = _stage(session, key)
        if stage.owner != owner.id:
            return stage.owner is None and stage.state == to  # by this very call, as below
        leases.release(stage, to, message, hint)
    return True


@patiently
def finish_stage(
    registry: Registry, home: Home, spec: StageSpec, owner: Owner, result: StageResult, seconds: float = 0.0
) -> bool:
    """The stage is done, for the job that ran it after `seconds`: its result and its new state in one transaction.
    False if it was taken over meanwhile."""
    summary = manifest_summary(home, spec.out_dir) if spec.kind is StageKind.PREPROCESS else {}
    with registry.write() as session:
        stage = _stage(session, spec.key)
        if stage.owner != owner.id:
            return stage.state == State.FINISHED  # by this very call, if the answer to its commit was lost
        leases.release(stage, State.FINISHED)
        session.execute(_link(stage.job_id, spec.key).values(cached=False, seconds=seconds))
        stage.metrics, stage.notes = plain(result.metrics), [str(note) for note in result.notes]
        stage.done = stage.total or stage.done
        session.execute(delete(Artefact).where(Artefact.stage_key == spec.key, Artefact.kind == "file"))
        for name, path in result.artefacts.items():
            row = Artefact(stage_key=spec.key, kind="file", name=name, path=home.relative(Path(path)), created=now())
            session.add(row)
        if spec.kind is StageKind.PREPROCESS:
            subject = next(iter(spec.sources.values())).name
            folder = home.relative(spec.out_dir)
            session.merge(Dataset(key=spec.key, subject=subject, folder=folder, summary=summary, created=now()))
    return True


def manifest_summary(home: Home, folder: Path) -> dict[str, Any]:
    """What the registry keeps of a dataset's manifest, nothing where there is none; the dropped frames themselves stay
    in the manifest."""
    import json

    try:
        path, store = folder / "manifest.json", home.store()
        manifest = json.loads(path.read_bytes() if store is None or path.exists() else store.read(path) or b"")
    except (OSError, ValueError):
        return {}
    kept = ("digest", "kind", "frames", "train", "eval", "fps", "reprojection_px", "portrait_size", "has_audio")
    summary = {name: manifest.get(name) for name in kept}
    return plain({**summary, "dropped": len(manifest.get("dropped") or ())})


@patiently
def set_progress(registry: Registry, key: str, owner: Owner, done: int | None, total: int | None, unit: str) -> bool:
    """How far a running stage is, for whoever looks from outside. False if it was taken over meanwhile."""
    with registry.write() as session:
        statement = update(Stage).where(Stage.key == key, Stage.owner == owner.id)
        changed: int = session.execute(statement.values(done=done, total=total, unit=unit)).rowcount  # type: ignore[attr-defined]
    return changed > 0


@patiently
def set_run(registry: Registry, row: Stage | Job, run_id: str | None, *, open_: bool) -> bool:
    """Remember the MLflow run of a stage or a job, and whether it still has to be ended.

    False, and nothing is written, if it has another owner by now than `row` says: its run is that one's.
    """
    table: type[Stage | Job] = type(row)
    this = Job.id == row.id if isinstance(row, Job) else Stage.key == row.key
    same = update(table).where(this, table.owner == row.owner)
    with registry.write() as session:
        changed: int = session.execute(same.values(mlflow_run_id=run_id, mlflow_open=open_)).rowcount  # type: ignore[attr-defined]
    if changed:
        row.mlflow_run_id, row.mlflow_open = run_id, open_
    return changed > 0


@patiently
def set_cached(registry: Registry, job_id: str, key: str) -> None:
    """This job's latest submit found the stage done."""
    with registry.write() as session:
        session.execute(_link(job_id, key).values(cached=True, seconds=0.0))


def _link(job_id: str | None, key: str) -> Update:
    return update(JobStage).where(JobStage.job_id == job_id, JobStage.stage_key == key)


@patiently
def begin_attempt(registry: Registry, job_id: str, todo: Sequence[str]) -> None:
    """A new submit of the job: the stages of these keys are to be run, the others are there already."""
    with registry.write() as session:
        of_job = update(JobStage).where(JobStage.job_id == job_id)
        session.execute(of_job.values(cached=True, seconds=0.0))
        session.execute(of_job.where(JobStage.stage_key.in_(todo)).values(cached=False))


@patiently
def finished(registry: Registry, home: Home, keys: Collection[str]) -> set[str]:
    """Of these stages, those that are done and whose files are still there: in the store, else in the home."""
    store = home.store()
    with registry.read() as session:
        stages = session.scalars(select(Stage).where(Stage.key.in_(list(keys)), Stage.state == State.FINISHED.value))
        done = {stage.key for stage in stages if store is not None or _files_present(session, home, stage)}
    return done if store is None else store.finished(done)


@patiently
def reopen_lost(registry: Registry, home: Home, keys: Collection[str]) -> list[Stage]:
    """Finished stages whose files were deleted become pending again; returns them."""
    wanted = list(keys)
    present = finished(registry, home, wanted)
    with registry.write() as session:
        chosen = select(Stage).where(Stage.key.in_(set(wanted) - present), Stage.state == State.FINISHED.value)
        lost = list(session.scalars(chosen.with_for_update()))
        for stage in lost:
            move(stage, State.PENDING)
            session.execute(delete(Artefact).where(Artefact.stage_key == stage.key, Artefact.kind == "file"))
    return lost


@patiently
def reopen_damaged(registry: Registry, home: Home, keys: Collection[str], take_away: Callable[[Path], bool]) -> None:
    """Finished stages become pending again whose folder `take_away` says it has taken away, because it was damaged.

    It is called while nobody else can finish or claim the stage.
    """
    with registry.write() as session:
        chosen = select(Stage).where(Stage.key.in_(list(keys)), Stage.state == State.FINISHED.value)
        for stage in session.scalars(chosen.with_for_update()):
            if take_away(home.absolute(stage.out_dir)):
                move(stage, State.PENDING)
                session.execute(delete(Artefact).where(Artefact.stage_key == stage.key, Artefact.kind == "file"))


def _files_present(session: Session, home: Home, stage: Stage) -> bool:
    marker = _MARKERS.get(StageKind(stage.kind))
    if marker and not (home.absolute(stage.out_dir) / marker).exists():
        return False
    rows = session.scalars(select(Artefact).where(Artefact.stage_key == stage.key, Artefact.kind == "file"))
    return all(whole(home.absolute(row.path)) for row in rows if row.path)


@patiently
def release_dead(registry: Registry) -> list[Stage | Job]:
    """Stages and jobs that a dead process left running become interrupted."""
    with registry.read() as session:
        if not _running(session):
            return []
    with registry.write() as session:
        dead = [row for row in _running(session, lock=True) if not leases.owner_alive(row)]
        for row in dead:
            leases.abandon(row)
    return dead


def dead(registry: Registry) -> list[Stage | Job]:
    """Stages and jobs that a dead process left running."""
    with registry.read() as session:
        return [row for row in _running(session) if not leases.owner_alive(row)]


def _running(session: Session, *, lock: bool = False) -> list[Stage | Job]:
    running = State.RUNNING.value
    stages, jobs = select(Stage).where(Stage.state == running), select(Job).where(Job.state == running)
    if lock:
        stages, jobs = stages.with_for_update(), jobs.with_for_update()
    return [*session.scalars(stages), *session.scalars(jobs)]


@patiently
def unended_runs(registry: Registry) -> list[Stage | Job]:
    """Rows whose MLflow run was opened, that nobody works on any more."""
    rows: list[Stage | Job] = []
    with registry.read() as session:
        for table in (Stage, Job):
            where = (table.mlflow_open.is_(True), table.state != State.RUNNING.value)
            rows.extend(session.scalars(select(table).where(*where)))
    return rows


@patiently
def store_model(registry: Registry, key: str, name: str, version: int, uri: str, kind: str = "model") -> None:
    """Remember a version in the model registry at `uri` (its password left out) that was made from this stage, or
    (`kind` "figures") that has the figures of this stage."""
    uri = masked(uri)
    with registry.write() as session:
        own, seen = (
            {"stage_key": key, "kind": kind, "name": name},
            {"version": version, "uri": uri, "created": now()},
        )
        insert_missing(session, Artefact, [own | seen])  # another job may be at the very same
        session.execute(update(Artefact).filter_by(**own).values(**seen))


@patiently
def forget_model(registry: Registry, name: str, version: int, uri: str) -> None:
    """The version was deleted from the model registry at `uri`: the next submit of its stage registers it again."""
    with registry.write() as session:
        gone = (Artefact.name == name, Artefact.version == version, Artefact.uri == masked(uri))
        session.execute(delete(Artefact).where(*gone))


@patiently
def record(
    registry: Registry, job_id: str | None, text: str, *, key: str | None = None, stage: str = "", level: str = "info"
) -> None:
    """One line of the job's log."""
    with registry.write() as session:
        session.add(Event(time=now(), job_id=job_id, stage_key=key, stage=stage, level=level, text=masked(text)))


def failure(error: BaseException) -> tuple[str, str]:
    """Message and hint of an exception, as they are stored."""
    if isinstance(error, LavatarError):
        return error.message, error.hint
    return masked(f"{type(error).__name__}: {error}"), "Run it again with --debug."


def _job(session: Session, job_id: str) -> Job:
    job = session.get(Job, job_id, with_for_update=True)
    if job is None:
        raise UnknownJobError(f"there is no job {job_id!r}", "Look them up with: lavatar jobs list")
    return job


def _stage(session: Session, key: str) -> Stage:
    stage = session.get(Stage, key, with_for_update=True)
    if stage is None:
        raise UnknownJobError(
            f"there is no stage {key[:12]!r}", "The registry was replaced while the job ran: submit again."
        )
    return stage
