"""A model file (modelfile.py) into a home: MLflow's model registry, and for a pair the registry that reenact looks in.

Nothing of it is believed before all of it was read: it is unpacked beside everything else, checked against its sums,
loaded, and only then registered, put in place and written down, in this order. Where one of these fails the folder is
removed; a version that was registered already is found by the next import of the same file.

A model's stages have keys of their own, digests of the weights. So a file, whatever it says of itself, never stands for
a stage that a submit of this home would run: that is trained here, of one's own video.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import or_, select

from lavatar.cluster.results import whole, write_result
from lavatar.contracts import StageKind, StageResult, StageSpec
from lavatar.errors import DataError, JobError, NameError_, UsageError
from lavatar.masking import masked
from lavatar.platform import ledger
from lavatar.platform.about import About, Someone, read_about
from lavatar.platform.belonging import belong
from lavatar.platform.champions import crown
from lavatar.platform.home import Home
from lavatar.platform.lineage import AVATAR_STAGE_TAG, JOB_TAG, PARENT_TAG, PREVIEW_RUN_TAG, PREVIEW_TAG
from lavatar.platform.modelfile import ABOUT, CARD, unpack_model_file
from lavatar.platform.modelregistry import (
    CHAMPION,
    MODEL_TAG,
    STAGE_TAG,
    Release,
    add_version,
    avatar_model_name,
    pair_model_name,
)
from lavatar.platform.planning import digest
from lavatar.platform.registry import Registry, hold_stages, insert_missing, now, patiently
from lavatar.platform.states import State, move
from lavatar.platform.subjects import check_name, find_subject
from lavatar.platform.tables import IMPORTED, Artefact, Job, JobPair, JobStage, Stage
from lavatar.platform.tracking import Tracker
from lavatar.training.files import exclusive, file_digest, storage_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

ELSEWHERE = {STAGE_TAG, JOB_TAG, AVATAR_STAGE_TAG, PARENT_TAG, PREVIEW_TAG, PREVIEW_RUN_TAG}
"""Tags of a version that name things of the home where it was trained."""
MOST_CARD = 5000
"""Characters of a version's description that MLflow takes."""


@dataclass(frozen=True)
class Imported:
    """What a file became. `new` is False where this version was there already."""

    model: str
    version: int
    avatar: str
    actor: str | None
    new: bool
    sha256: str


@dataclass(frozen=True)
class _Model:
    """A file that was unpacked and found whole, under the names that it gets here."""

    about: About
    folder: Path
    card: str
    keys: tuple[str, ...]  # of its stages here: the avatar's, the pair's
    image_size: int

    @property
    def name(self) -> str:
        names = [person.name for person in self.about.people]
        return pair_model_name(names[0], names[1]) if self.about.actor else avatar_model_name(names[0])

    @property
    def roles(self) -> tuple[str, ...]:
        return ("avatar", "pair")[: len(self.keys)]

    @property
    def stages(self) -> tuple[str, ...]:
        """What its stages are called."""
        names = [person.name for person in self.about.people]
        return (f"avatar:{names[0]}", f"pair:{'<-'.join(names)}")[: len(self.keys)]


def import_model(home: Home, registry: Registry, file: Path, renamed: str | None) -> Imported:
    """The model in `file`, made usable in this home; `renamed`: NAME or AVATAR:ACTOR instead of the names in it.

    Raises DataError for a file that is damaged or was changed, UsageError where its names cannot be used here,
    StorageError where the registry's results lie in another home.
    """
    belong(registry, home)
    with (
        exclusive(home.root / "import.lock"),
        tempfile.TemporaryDirectory(prefix="release-", dir=home.root) as scratch,
    ):
        model = _read(home, file, Path(scratch), renamed)
        for person in model.about.people:
            _require_same(registry, person, file)
        tracker = Tracker(home, lambda text: None)
        found = _registered(tracker.client, model)
        version = int(found.version) if found else _add(home, tracker, model)
        if not (found and found.description):
            _describe(home, tracker.client, model, version)
        if model.about.actor:
            _settle(home, registry, model, version, tracker.uri, file)
        actor = model.about.actor.name if model.about.actor else None
        return Imported(model.name, version, model.about.avatar.name, actor, found is None, file_digest(file))


def _read(home: Home, file: Path, scratch: Path, renamed: str | None) -> _Model:
    """Unpacked, checked and loaded."""
    if file.is_file():
        home.require_space(2 * file.stat().st_size)  # here and in MLflow
    kind = unpack_model_file(file, scratch)
    try:
        about = read_about(scratch / ABOUT)
        if about.kind != kind:
            raise DataError(f"it is said to be a model of kind {about.kind} and is one of kind {kind}")
        image_size = _load(scratch, kind)
    except DataError as error:  # its sums are right: it was made so
        reason = error.message.replace(f"{scratch}/", "")
        raise DataError(
            f"{file} cannot be used: {reason}", "Have it exported by the same lavatar as this one."
        ) from None
    keys: list[str] = []
    for role in ("avatar", "pair")[: len(about.people)]:
        parts = [file_digest(path) for path in sorted((scratch / role).iterdir())]
        keys.append(digest("import", role, *keys, *parts))
    card = (scratch / CARD).read_text(errors="replace").replace("\0", "")[:MOST_CARD]
    return _Model(_under(about, renamed), scratch, card, tuple(keys), image_size)


def _load(folder: Path, kind: str) -> int:
    """Loads the releases as reenact will. The side of the avatar's portraits. Raises DataError."""
    from lavatar.inference.loading import load_avatar, load_pair

    avatar = load_avatar(folder / "avatar")
    pair = load_pair(folder / "pair") if kind == "pair" else None
    if pair and pair.theta_dim != avatar.config.code_dim:
        raise DataError(f"the pair gives codes of {pair.theta_dim} numbers, its avatar takes {avatar.config.code_dim}")
    if not all(whole(folder / role) for role in ("avatar", "pair")[: 2 if pair else 1]):
        raise DataError("a release in it names other weights than its own")
    return avatar.config.image_size


def _under(about: About, renamed: str | None) -> About:
    """Under other names. Raises UsageError, NameError_."""
    if renamed is None:
        names = [person.name for person in about.people]
    else:
        avatar, colon, actor = renamed.partition(":")
        if colon and not about.actor:
            raise UsageError(f"--as {renamed}: this is a model of one person", f"Write: --as {avatar}")
        names = [check_name(avatar), check_name(actor) if colon else about.people[-1].name][: len(about.people)]
    if len(set(names)) < len(names):
        raise UsageError(f"avatar and actor are both {names[0]!r}", "Name them apart: --as AVATAR:ACTOR")
    people = [replaced.model_copy(update={"name": name}) for replaced, name in zip(about.people, names, strict=True)]
    return about.model_copy(update=dict(zip(("avatar", "actor"), people, strict=False)))


def _require_same(registry: Registry, person: Someone, file: Path) -> None:
    """Raises NameError_ where the name stands for another video here: one name, one person."""
    subject = find_subject(registry, person.name)
    with registry.read() as session:
        chosen = select(JobPair).where(or_(JobPair.avatar == person.name, JobPair.actor == person.name))
        rows = list(session.scalars(chosen))
    digests = {row.avatar_digest if row.avatar == person.name else row.actor_digest for row in rows}
    known = {subject.digest} if subject else digests
    if known and person.digest not in known:
        raise NameError_(
            f"the name {person.name!r} stands for another video here than in {file}",
            f"Import it under another one: lavatar models import {file} --as NAME (of a pair: --as AVATAR:ACTOR)",
        )


def _registered(client: MlflowClient, model: _Model) -> ModelVersion | None:
    """The version that an earlier import of the same made."""
    found = client.search_model_versions(f"name='{model.name}'")
    return next((each for each in found if each.tags.get(STAGE_TAG) == model.keys[-1]), None)


def _release(model: _Model) -> Release:
    names = [person.name for person in model.about.people]
    return Release(
        StageKind(model.about.kind),
        model.keys[-1],
        model.name,
        {role: model.folder / role for role in model.roles},
        model.image_size,
        model.about.read_recipe().preprocess.face_size,
        pair=(names[0], names[1]) if model.about.actor else None,
        about=model.about,
    )


def _add(home: Home, tracker: Tracker, model: _Model) -> int:
    """As a new version. Raises JobError."""
    tracker.wait()
    try:
        return add_version(home, tracker, _release(model), None)
    except JobError:
        raise
    except Exception as error:  # whatever MLflow raises
        text = masked(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
        raise JobError(f"{model.name} could not be registered in MLflow ({text})", "Try it again.") from error


def _describe(home: Home, client: MlflowClient, model: _Model, version: int) -> None:
    """The tags that it had where it was trained, less those that lead to what is there alone; the first version of a
    name becomes its champion; then the card, which says that all is there."""
    tags = {key: value for key, value in model.about.tags.items() if key.startswith(MODEL_TAG) and key not in ELSEWHERE}
    try:
        for key, value in tags.items():
            client.set_model_version_tag(model.name, str(version), key, value)
        if CHAMPION not in client.get_registered_model(model.name).aliases:
            crown(home, client, model.name, version)
        client.update_model_version(model.name, str(version), model.card)
    except Exception as error:  # whatever MLflow raises
        text = masked(str(error).partition("\n")[0])
        raise JobError(f"MLflow did not take the card of {model.name}: {text}", "Import it again.") from error


def _settle(home: Home, registry: Registry, model: _Model, version: int, uri: str, file: Path) -> None:
    """The releases into the folders of their stages, and these into the registry."""
    specs = _specs(home, model)
    done = ledger.finished(registry, home, model.keys)
    store = home.store()
    for role, spec in zip(model.roles, specs, strict=True):
        if spec.key in done:
            continue
        with storage_errors(spec.out_dir):
            shutil.rmtree(spec.out_dir, ignore_errors=True)
            spec.out_dir.mkdir(parents=True)
            os.replace(model.folder / role, spec.out_dir / "release")
        write_result(spec, StageResult({"release": spec.out_dir / "release"}))
        if store:
            store.publish(spec)
            store.finish(spec)
    job_id = _store(registry, home, model, specs)
    ledger.store_model(registry, model.keys[-1], model.name, version, uri)
    ledger.record(registry, job_id, f"imported {file.name} as {model.name} version {version}", key=model.keys[-1])


def _specs(home: Home, model: _Model) -> list[StageSpec]:
    kinds = (StageKind.AVATAR, StageKind.PAIR)
    return [
        StageSpec(kind, name, key, home.root, home.out_dir(kind, key), {}, {})
        for kind, name, key in zip(kinds, model.stages, model.keys, strict=False)
    ]


@patiently
def _store(registry: Registry, home: Home, model: _Model, specs: Sequence[StageSpec]) -> str:
    """The import as a finished job of one pair; its id."""
    about, keys = model.about, model.keys
    assert about.actor is not None
    pair = {"avatar": about.avatar.name, "actor": about.actor.name}
    digests = {"avatar_digest": about.avatar.digest, "actor_digest": about.actor.digest}
    job_id, recipe, when = digest("import", *pair.values(), *keys)[:10], about.read_recipe(), now()
    job = {
        **pair,
        "id": job_id,
        "recipe_name": recipe.name,
        "recipe": recipe.model_dump(mode="json"),
        "state": State.FINISHED.value,
        "message": IMPORTED,
        **dict.fromkeys(("created", "started", "ended"), when),
    }
    stages = [
        {"key": s.key, "kind": s.kind.value, "name": s.name, "out_dir": home.relative(s.out_dir), "created": when}
        for s in specs
    ]
    links = [{"job_id": job_id, "stage_key": s.key, "name": s.name, "position": i} for i, s in enumerate(specs)]
    files = [
        {"stage_key": s.key, "kind": "file", "name": "release", "path": home.relative(s.out_dir / "release")}
        for s in specs
    ]
    with registry.write() as session:
        hold_stages(session)
        insert_missing(session, Job, [job])
        insert_missing(session, JobPair, [{"job_id": job_id, **pair, **digests}])
        insert_missing(session, Stage, stages)
        insert_missing(session, JobStage, links)
        insert_missing(session, Artefact, [{**each, "created": when} for each in files])
        waiting = select(Stage).where(Stage.key.in_(keys), Stage.state == State.PENDING.value)
        for stage in session.scalars(waiting.with_for_update()):
            for state in (State.RUNNING, State.FINISHED):
                move(stage, state)
            stage.started = stage.ended = when
    return job_id
