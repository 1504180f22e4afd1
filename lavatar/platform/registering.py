"""The models of a job on their way into the model registry, beside the scheduling: MLflow takes a second for each."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from lavatar.contracts import StageKind
from lavatar.errors import LavatarError, StageFailedError, UnknownJobError
from lavatar.masking import masked
from lavatar.platform import ledger, lookup
from lavatar.platform.execution import Office
from lavatar.platform.leases import owner_alive
from lavatar.platform.modelregistry import Release, avatar_model_name, pair_model_name, register
from lavatar.platform.planning import Plan
from lavatar.platform.states import State
from lavatar.platform.tables import Stage
from lavatar.platform.tracking import Tracker

PROGRESS_SECONDS = 10.0


def releases(plan: Plan) -> list[Release]:
    """The models that this job registers."""
    sizes = (plan.recipe.avatar.image_size, plan.recipe.preprocess.face_size)
    found: dict[str, Release] = {}
    for pair in plan.pairs:
        names, inputs = (pair.avatar.name, pair.actor.name), pair.preview.spec.inputs
        own, both = avatar_model_name(names[0]), pair_model_name(*names)
        folders = {"avatar": inputs["avatar"], "pair": inputs["pair"]}
        avatar = {"avatar": inputs["avatar"]}
        found[own] = Release(StageKind.AVATAR, pair.head.key, own, avatar, *sizes, inputs["avatar_dataset"])
        found[both] = Release(StageKind.PAIR, pair.bridge.key, both, folders, *sizes, inputs["actor_dataset"], names)
    return list(found.values())


def unregistered(office: Office, wanted: Sequence[Release]) -> list[Release]:
    """Those of them that are not in the model registry of today's tracking server."""
    if not wanted:
        return []
    rows = lookup.artefacts(office.registry, [r.stage_key for r in wanted], "model")
    present = {(row.stage_key, row.name) for row in rows if row.uri == masked(office.home.tracking_uri)}
    return [r for r in wanted if (r.stage_key, r.name) not in present]


class Registrar:
    """Registers the models of stages as they finish, one after the other.

    Leaving it waits for what is due; when the job is stopped, only for the one in hand: the next submit goes on.
    """

    def __init__(self, office: Office, plan: Plan, tracker: Tracker | None, warn: Callable[[str], None]) -> None:
        self._office, self._job_id, self._tracker, self._warn = office, plan.job_id, tracker, warn
        self._all = releases(plan)
        self._of_stage: defaultdict[str, list[Release]] = defaultdict(list)
        for release in self._all:
            self._of_stage[release.stage_key].append(release)
        self._pool = ThreadPoolExecutor(1, "registrar")
        self._waiting: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._due(self._all)  # also those of stages that were there already
            if error is None or isinstance(error, StageFailedError):
                self._drain()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def finished(self, key: str) -> None:
        """The stage is done: its models are due."""
        self._due(self._of_stage[key])

    def _due(self, models: Sequence[Release]) -> None:
        if self._tracker and models:
            self._waiting.append(self._pool.submit(self._register, models))

    def _drain(self) -> None:
        """Wait for all that is due. Raises what the registry raised."""
        said = time.monotonic()
        for number, future in enumerate(self._waiting, 1):
            while not future.done():
                with contextlib.suppress(TimeoutError):
                    future.result(0.2)
                if not future.done() and time.monotonic() - said > PROGRESS_SECONDS:
                    said = time.monotonic()
                    self._office.display.message(f"registering models: {number} of {len(self._waiting)}")
            future.result()

    def _register(self, models: Sequence[Release]) -> None:
        registry = self._office.registry
        for release in unregistered(self._office, models):
            stage = lookup.get_stage(registry, release.stage_key)
            if stage and self._another_does(stage):
                continue
            version = self._version(release, stage.mlflow_run_id if stage else None)
            if version is not None:
                assert self._tracker is not None
                ledger.store_model(registry, release.stage_key, release.name, version, self._tracker.uri)
                text = f"registered {release.name} version {version}"
                with contextlib.suppress(LavatarError):
                    ledger.record(registry, self._job_id, text, key=release.stage_key)

    def _another_does(self, stage: Stage) -> bool:
        """Whether the job that made the stage still runs: then its models are that job's to register."""
        if stage.job_id in (None, self._job_id):
            return False
        try:
            job = lookup.get_job(self._office.registry, str(stage.job_id))
        except UnknownJobError:  # deleted
            return False
        return job.state == State.RUNNING and owner_alive(job)

    def _version(self, release: Release, run_id: str | None) -> int | None:
        """The version that was registered; None and a warning where something is missing: the next submit tries it."""
        assert self._tracker is not None
        try:
            self._office.home.fetch(*release.folders.values())
        except LavatarError as error:
            self._warn(f"{release.name} could not be registered: {error.message}")
            return None
        return register(self._office.home, self._tracker, release, run_id, self._warn)
