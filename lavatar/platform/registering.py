"""The models of a job on their way into the model registry, beside the scheduling: MLflow takes a second for each."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from lavatar.contracts import StageKind
from lavatar.errors import LavatarError, StageFailedError, UnknownJobError
from lavatar.masking import masked
from lavatar.platform import ledger, lookup
from lavatar.platform.about import About
from lavatar.platform.champions import measure
from lavatar.platform.execution import Office
from lavatar.platform.leases import owner_alive
from lavatar.platform.lineage import PARENT_TAG, PREVIEW_RUN_TAG, PREVIEW_TAG, Lineage
from lavatar.platform.modelcard import card
from lavatar.platform.modelregistry import Release, avatar_model_name, pair_model_name, register
from lavatar.platform.planning import Plan
from lavatar.platform.states import State
from lavatar.platform.tables import Stage
from lavatar.platform.tracking import Tracker

PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class Model:
    """A model that a job registers, and the previews of the job that measure it."""

    release: Release
    lineage: Lineage
    previews: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.release.name


def models_of(plan: Plan) -> list[Model]:
    """The models that this job registers, each avatar's before those of its pairs."""
    sizes = (plan.recipe.avatar.image_size, plan.recipe.preprocess.face_size)
    found: dict[str, Model] = {}
    for pair in plan.pairs:
        names, inputs = (pair.avatar.name, pair.actor.name), pair.preview.spec.inputs
        own, both = avatar_model_name(names[0]), pair_model_name(*names)
        folders = {"avatar": inputs["avatar"], "pair": inputs["pair"]}
        faces = {"avatar": inputs["avatar_dataset"], "pair": inputs["actor_dataset"]}
        avatar = Release(
            StageKind.AVATAR, pair.head.key, own, {"avatar": inputs["avatar"]}, *sizes, faces["avatar"],
            about=About.of_avatar(plan, pair),
        )  # fmt: skip
        bridge = Release(
            StageKind.PAIR, pair.bridge.key, both, folders, *sizes, faces["pair"], names,
            about=About.of_pair(plan, pair),
        )  # fmt: skip
        previews = (*(found[own].previews if own in found else ()), pair.preview.key)
        found[own] = Model(avatar, Lineage.of_avatar(plan, pair), previews)
        found[both] = Model(bridge, Lineage.of_pair(plan, pair), (pair.preview.key,))
    return list(found.values())


@dataclass(frozen=True)
class Standing:
    """How far a model is in the model registry of today's tracking server: its version, the finished previews whose
    figures the version does not have, and all that are finished, the newest first."""

    version: int | None
    missing: tuple[Stage, ...]
    finished: tuple[Stage, ...]

    @property
    def complete(self) -> bool:
        return self.version is not None and not self.missing


def standings(office: Office, models: Sequence[Model]) -> list[Standing]:
    """Of each of them."""
    registry, uri = office.registry, masked(office.home.tracking_uri)
    trained = lookup.artefacts(registry, {model.release.stage_key for model in models}, "model")
    versions = {(row.stage_key, row.name): row.version for row in trained if row.uri == uri}
    keys = {key for model in models for key in model.previews}
    given = {(row.stage_key, row.name, row.version) for row in lookup.artefacts(registry, keys, "figures")
             if row.uri == uri}  # fmt: skip
    stages = {stage.key: stage for stage in lookup.get_stages(registry, keys) if stage.state == State.FINISHED}
    found = []
    for model in models:
        version = versions.get((model.release.stage_key, model.name))
        finished = sorted((stages[key] for key in model.previews if key in stages), key=lambda s: -(s.ended or 0.0))
        missing = [stage for stage in finished if (stage.key, model.name, version) not in given]
        if model.release.kind is StageKind.AVATAR and len(missing) < len(finished):
            missing = []  # what an avatar does by itself is the same in every pair's preview
        found.append(Standing(version, tuple(missing), tuple(finished)))
    return found


def outstanding(office: Office, models: Sequence[Model]) -> bool:
    """Whether one of them is not registered yet, or its version lacks the figures of a finished preview."""
    return bool(models) and not all(standing.complete for standing in standings(office, models))


def _due_at(model: Model) -> tuple[str, ...]:
    """The stages at whose end a model is registered or measured.

    A pair's waits for its preview, so that its version is made with its figures: each added later costs MLflow a
    look-up. An avatar's does not: the versions of its pairs name it.
    """
    own = () if model.release.kind is StageKind.PAIR else (model.release.stage_key,)
    return (*own, *model.previews)


class Registrar:
    """Registers avatars as they finish and pairs as their previews do, one after the other, and gives avatars' versions
    the figures of a preview: with those a version contends for the champion.

    Leaving it waits for what is due; when the job is stopped, only for the one in hand: the next submit goes on.
    """

    def __init__(self, office: Office, plan: Plan, tracker: Tracker | None, warn: Callable[[str], None]) -> None:
        self._office, self._job_id, self._tracker, self._warn = office, plan.job_id, tracker, warn
        self._all = models_of(plan)
        self._alone = len(plan.pairs) == 1  # of many pairs only the log says which are champions
        self._of_stage: defaultdict[str, list[Model]] = defaultdict(list)
        for model in self._all:
            for key in _due_at(model):
                self._of_stage[key].append(model)
        self._pool = ThreadPoolExecutor(1, "registrar")
        self._waiting: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None or isinstance(error, StageFailedError):
                self._due(self._all)  # also of stages that were there already, and those whose preview failed
                self._drain()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def finished(self, key: str) -> None:
        """The stage is done: the models that it made or measured are due."""
        self._due(self._of_stage[key])

    def _due(self, models: Sequence[Model]) -> None:
        if self._tracker and models:
            self._waiting.append(self._pool.submit(self._bring, models))

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

    def _bring(self, models: Sequence[Model]) -> None:
        """One by one: a pair's version names that of its avatar."""
        for model, standing in zip(models, standings(self._office, models), strict=True):
            if not standing.complete:
                self._bring_one(model, standing)

    def _bring_one(self, model: Model, standing: Standing) -> None:
        stage = lookup.get_stage(self._office.registry, model.release.stage_key)
        if stage and stage.state != State.FINISHED:
            return
        version, contest = standing.version, model.lineage.contest()
        preview = standing.finished[0] if standing.finished else None
        release = self._described(model, stage, preview)
        if new := version is None:
            version = None if stage and self._another_does(stage) else self._version(release, stage)
            if version is None:
                return
            self._remember(release.stage_key, release.name, version, "model")
            self._record(release.stage_key, f"registered {release.name} version {version}")
        if preview is None and contest.policy != "always":
            return
        assert self._tracker is not None
        decided = measure(self._office.home, self._tracker, release, version, contest, self._warn, new=new)
        if decided is not None:
            for measured in standing.finished:
                self._remember(measured.key, release.name, version, "figures")
            self._record(release.stage_key, decided)
            if self._alone:
                self._office.display.message(decided)

    def _described(self, model: Model, stage: Stage | None, preview: Stage | None) -> Release:
        """The release with all that is known of it now."""
        lineage, registry = model.lineage, self._office.registry
        summaries = lookup.dataset_summaries(registry, lineage.datasets)
        tags = lineage.tags()
        if lineage.avatar_stage:
            own, uri = avatar_model_name(lineage.people[0].name), masked(self._office.home.tracking_uri)
            rows = lookup.artefacts(registry, [lineage.avatar_stage], "model")
            parent = next((row.version for row in rows if (row.name, row.uri) == (own, uri)), None)
            tags |= {PARENT_TAG: f"{own}/{parent}"} if parent else {}
        if preview:
            tags |= {**lineage.measured(preview.metrics), PREVIEW_TAG: preview.key}
            tags |= {PREVIEW_RUN_TAG: preview.mlflow_run_id} if preview.mlflow_run_id else {}
        text = card(lineage, summaries, stage.seconds if stage else 0.0, preview.metrics if preview else None)
        return replace(model.release, tags=tags, card=text)

    def _remember(self, key: str, name: str, version: int, kind: str) -> None:
        assert self._tracker is not None
        ledger.store_model(self._office.registry, key, name, version, self._tracker.uri, kind)

    def _record(self, key: str, text: str) -> None:
        with contextlib.suppress(LavatarError):
            ledger.record(self._office.registry, self._job_id, text, key=key)

    def _another_does(self, stage: Stage) -> bool:
        """Whether the job that made the stage still runs: then its models are that job's to register."""
        if stage.job_id in (None, self._job_id):
            return False
        try:
            job = lookup.get_job(self._office.registry, str(stage.job_id))
        except UnknownJobError:  # deleted
            return False
        return job.state == State.RUNNING and owner_alive(job, lookup.time_of(self._office.registry))

    def _version(self, release: Release, stage: Stage | None) -> int | None:
        """The version that was registered; None and a warning where something is missing: the next submit tries it."""
        assert self._tracker is not None
        try:
            self._office.home.fetch(*release.folders.values())
        except LavatarError as error:
            self._warn(f"{release.name} could not be registered: {error.message}")
            return None
        return register(self._office.home, self._tracker, release, stage.mlflow_run_id if stage else None, self._warn)
