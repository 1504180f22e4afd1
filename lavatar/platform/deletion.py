"""Forgetting a job or a sweep. What jobs made stays on disk until `lavatar gc` frees what no other job needs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from sqlalchemy import delete, select

from lavatar.errors import StageBusyError
from lavatar.platform import leases, sweeps
from lavatar.platform.home import Home
from lavatar.platform.registry import Registry
from lavatar.platform.states import State
from lavatar.platform.tables import Event, Job, JobPair, JobStage
from lavatar.platform.usage import needed


def delete_job(registry: Registry, job_id: str) -> list[str]:
    """Forget a job with its log; the keys of the stages that no job needs any more.

    Raises StageBusyError while it runs; deleting a job that is gone changes nothing.
    """
    with registry.write() as session:
        job = session.get(Job, job_id, with_for_update=True)
        if job is None:
            return []
        if job.state == State.RUNNING and leases.owner_alive(job):
            raise StageBusyError(
                f"job {job.id} cannot be deleted: process {job.owner_pid} runs it",
                f"Stop it first: lavatar jobs cancel {job.id}",
            )
        keys = list(session.scalars(select(JobStage.stage_key).where(JobStage.job_id == job.id)))
        for table in (JobStage, JobPair, Event):
            session.execute(delete(table).where(table.job_id == job.id))
        session.delete(job)
        session.flush()
        return [key for key in keys if not needed(session, key)]


def delete_sweep(home: Home, registry: Registry, folder: Path) -> list[str]:
    """Remove a sweep's folder and log and forget its job; the keys of the stages that no job needs any more.

    Raises StageBusyError while it runs. Its MLflow runs stay until `lavatar gc`.
    """
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    with sweeps.alone(folder):
        left = delete_job(registry, folder.name)
        os.replace(folder, part)
    (home.root / "logs" / f"sweep-{folder.name}.log").unlink(missing_ok=True)
    shutil.rmtree(part)
    return left
