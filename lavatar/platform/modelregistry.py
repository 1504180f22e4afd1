"""Finished models in MLflow's model registry: pyfunc models from code whose artefacts are safetensors and JSON.

`mlflow.pyfunc.load_model("models:/lavatar-avatar-A@champion")` then works wherever lavatar is installed; its predict
takes pictures of the actor (whole frames, or face crops) and gives portraits. One version a finished stage and name: an
avatar's is registered as soon as it is trained, a pair's when its preview is done or has failed. What no preview has
measured is only `latest`, MLflow's own alias of the newest (champions.py).

The name of a pair's model does not say whose it is where names have hyphens (a-b driven by c, a driven by b-c). So the
registered model carries its pair as tags, and another pair is refused under the same name.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from lavatar.contracts import StageKind
from lavatar.errors import JobError
from lavatar.masking import masked
from lavatar.platform.about import About
from lavatar.platform.home import Home
from lavatar.platform.tracking import Tracker, Warn

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

T = TypeVar("T")

CHAMPION = "champion"
AVATAR_TAG, ACTOR_TAG = "lavatar.avatar", "lavatar.actor"  # of a registered model
MODEL_TAG = "lavatar."  # what the tags begin with that are ours
STAGE_TAG = "lavatar.stage"  # of a version
VERSIONS_TAG = "mlflow.modelVersions"  # of a logged model
MODELS = "lavatar/models"  # experiment of models whose stage has no run
_BYTES = tuple(map(str, range(256)))
_SCRIPTS = {StageKind.AVATAR: "avatar_model.py", StageKind.PAIR: "pair_model.py"}


@dataclass(frozen=True)
class Release:
    """A model to be registered: which stage made it, its releases by role, sides of portraits and faces, a dataset;
    what its version says of itself."""

    kind: StageKind
    stage_key: str
    name: str
    folders: Mapping[str, Path]
    image_size: int
    face_size: int = 128
    faces: Path | None = None  # a dataset: one of its face crops is the example
    pair: tuple[str, str] | None = None  # avatar and actor of a pair's model
    tags: Mapping[str, str] = field(default_factory=dict)
    card: str = ""
    about: About | None = None  # without, the model takes face crops alone and cannot be exported

    @property
    def owner(self) -> dict[str, str]:
        """Whose the registered model is, as its tags."""
        return dict(zip((AVATAR_TAG, ACTOR_TAG), self.pair or (), strict=False))


def avatar_model_name(avatar: str) -> str:
    return f"lavatar-avatar-{avatar}"


def pair_model_name(avatar: str, actor: str) -> str:
    return f"lavatar-pair-{avatar}-{actor}"


def register(home: Home, tracker: Tracker, release: Release, run_id: str | None, warn: Warn) -> int | None:
    """A new version of `release.name`, logged into run `run_id` and ending it. None and a warning if MLflow failed."""

    def log() -> int:
        return add_version(home, tracker, release, run_id)

    return attempt(tracker, f"{release.name} could not be registered", log, warn)


def add_version(home: Home, tracker: Tracker, release: Release, run_id: str | None) -> int:
    """The same; raises JobError where the name is another pair's, and whatever MLflow raises.

    Each call is a transaction of MLflow's, or a request to its server: what can be said in one is, and nothing is read
    back. Hence MLflow's client, and not `log_model`, which does the same in more than twice as many.
    """
    import mlflow

    mlflow.set_tracking_uri(tracker.uri)  # a source that is a logged model is looked up there, whichever client says it
    mlflow.set_registry_uri(tracker.uri)
    owner = _owner(tracker.client, release)
    if run_id is None:  # MLflow's own experiment keeps its files in the current folder
        run_id = tracker.open_stage(MODELS, "model", None, None, {})
    if run_id is None:
        raise JobError("MLflow gives no run to keep the model in", "Submit again to retry.")
    run = tracker.client.get_run(run_id).info
    status = "FAILED"
    try:
        logged = _log(home, tracker, release, run_id, run.experiment_id)
        version = _add(tracker.client, release, logged, owner)
        status = "FINISHED"
    finally:
        if run.status == "RUNNING":
            tracker.client.set_terminated(run_id, status=status)
    return version


def attempt(tracker: Tracker, failed: str, action: Callable[[], T], warn: Warn, *, wait: bool = True) -> T | None:
    """What `action` does in MLflow, which is waited for (`wait`) where it is away; None and a warning, beginning
    `failed`, if it does not come to be: the models on disk are not touched by it."""
    if wait:
        tracker.wait()
    try:
        return action()
    except JobError as error:
        warn(f"{error.message}. {error.hint}")
    except Exception as error:  # whatever MLflow raises
        text = masked((str(error).strip().splitlines() or [""])[0])
        warn(f"{failed} in MLflow ({type(error).__name__}: {text}); submit again to retry")
    return None


def _log(home: Home, tracker: Tracker, release: Release, run_id: str, experiment_id: str) -> LoggedModel:
    """The model as one of the run's, with its files."""
    from mlflow.entities import LoggedModelOutput

    client, whole = tracker.client, False
    logged = client.create_logged_model(experiment_id, release.kind.value, run_id)
    try:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        with tempfile.TemporaryDirectory(prefix="release-", dir=home.root) as scratch:
            _save(Path(scratch), release, logged)
            client.log_model_artifacts(logged.model_id, f"{scratch}/model")
        whole = True
    finally:
        client.finalize_logged_model(logged.model_id, "READY" if whole else "FAILED")
    return logged


def _save(scratch: Path, release: Release, logged: LoggedModel) -> None:
    """The model in MLflow's own form as `scratch`/model.

    The example is written here, as MLflow writes it: its own encoder takes longer than all else that is saved.
    """
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    folder, copies = scratch / "model", scratch / "copies"
    for role, source in release.folders.items():  # MLflow names artefacts by their folders, which are all "release"
        shutil.copytree(source, copies / role, ignore=_links)
    if release.about:
        release.about.write(copies)
    byte = np.dtype(np.uint8)
    pictures, portrait = (-1, -1, -1, 3), (-1, release.image_size, release.image_size, 3)
    model = Model(
        artifact_path=logged.artifact_location,
        model_uuid=logged.model_id,
        run_id=logged.source_run_id,
        metadata={"stage": release.stage_key},
        model_id=logged.model_id,
        saved_input_example_info={
            "artifact_path": "input_example.json",
            "serving_input_path": "serving_input_example.json",
            "type": "ndarray",
        },
    )
    mlflow.pyfunc.save_model(
        path=folder,
        mlflow_model=model,
        python_model=str(Path(__file__).with_name(_SCRIPTS[release.kind])),
        artifacts={path.stem: str(path) for path in copies.iterdir()},
        signature=ModelSignature(Schema([TensorSpec(byte, pictures)]), Schema([TensorSpec(byte, portrait)])),
        pip_requirements=[f"lavatar=={_version()}"],
    )
    example = _example_text(release.faces, release.face_size)
    (folder / "input_example.json").write_text(example)
    (folder / "serving_input_example.json").write_text(f'{{"inputs": {example}}}')


def _add(client: MlflowClient, release: Release, logged: LoggedModel, owner: Mapping[str, str] | None) -> int:
    """The logged model as a new version; `owner`: tags of the registered model, None where that is not there yet."""
    from mlflow.exceptions import MlflowException

    if owner is None:
        owner = _made(client, release)
    for key, value in release.owner.items():
        if owner.get(key) != value:
            client.set_registered_model_tag(release.name, key, value)
    made = client.create_model_version(
        release.name,
        f"models:/{logged.model_id}",
        logged.source_run_id,
        tags={**release.tags, STAGE_TAG: release.stage_key},
        description=release.card or None,
        model_id=logged.model_id,
    )
    with contextlib.suppress(MlflowException):  # a link on MLflow's page of the logged model; the version is there
        link = json.dumps([{"name": made.name, "version": made.version}])
        client.set_logged_model_tags(logged.model_id, {VERSIONS_TAG: link})
    return int(made.version)


def describe(client: MlflowClient, name: str, version: int, tags: Mapping[str, str], card: str, replaced: str) -> None:
    """Give a version these tags, and the card as its description; what it has already is not sent again.

    Of its tags that begin with `replaced` only these are left.
    """
    now = client.get_model_version(name, str(version))
    for key in now.tags:
        if key.startswith(replaced) and key not in tags:
            client.delete_model_version_tag(name, str(version), key)
    for key, value in tags.items():
        if now.tags.get(key) != value:
            client.set_model_version_tag(name, str(version), key, value)
    if card and now.description != card:
        client.update_model_version(name, str(version), card)


def _links(folder: str, names: list[str]) -> list[str]:
    """What a copy leaves out: a link in a release could lead to any file of this machine."""
    return [name for name in names if (Path(folder) / name).is_symlink()]


def _owner(client: MlflowClient, release: Release) -> dict[str, str] | None:
    """The tags of the registered model of this name, None where there is none. JobError where it is another pair's: its
    champion must not become this one."""
    from mlflow.exceptions import MlflowException

    try:
        tags = dict(client.get_registered_model(release.name).tags)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    own = release.owner
    theirs = {key: tags[key] for key in own if key in tags}
    if theirs and theirs != own:
        raise JobError(
            f"{release.name} is already the model of avatar {theirs.get(AVATAR_TAG)!r} driven by "
            f"{theirs.get(ACTOR_TAG)!r}; that of avatar {own[AVATAR_TAG]!r} driven by "
            f"{own[ACTOR_TAG]!r} is not registered in MLflow",
            "It is complete on disk. To register it too, add a subject under a name without hyphens and submit again.",
        )
    return tags


def _made(client: MlflowClient, release: Release) -> dict[str, str]:
    """A registered model of this name, made now, or by another process a moment ago; its tags. JobError as above."""
    from mlflow.exceptions import MlflowException

    try:
        return dict(client.create_registered_model(release.name, release.owner).tags)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return _owner(client, release) or {}


@lru_cache(16)  # an actor's is that of all the pairs it is in
def _example_text(faces: Path | None, size: int) -> str:
    """The example as JSON, without a list a pixel: so many make Python's garbage collector look through all it has."""
    picture = _example(faces, size)
    _, height, width, _ = picture.shape
    values = map(_BYTES.__getitem__, picture.tobytes())
    pixels = [f"[{r}, {g}, {b}]" for r, g, b in zip(values, values, values, strict=True)]
    rows = [f"[{', '.join(pixels[row * width : (row + 1) * width])}]" for row in range(height)]
    return f"[[{', '.join(rows)}]]"


def _example(faces: Path | None, size: int) -> np.ndarray:
    """One face crop as the model takes it: from the dataset, or grey."""
    if faces is not None and (faces / "manifest.json").exists():
        from lavatar.datasets.shards import iterate

        sample = next(iter(iterate(faces)), None)
        if sample is not None and sample.face.shape == (size, size, 3):
            return np.asarray(sample.face, np.uint8)[None]
    return np.full((1, size, size, 3), 128, np.uint8)


def _version() -> str:
    from importlib.metadata import version

    return version("lavatar")
