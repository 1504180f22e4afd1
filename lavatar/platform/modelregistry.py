"""Finished models in MLflow's model registry: pyfunc models from code whose artefacts are safetensors and JSON.

`mlflow.pyfunc.load_model("models:/lavatar-avatar-A@champion")` then works wherever lavatar is installed; its predict
takes pictures of the actor (whole frames, or face crops) and gives portraits. One version a finished stage and name: an
avatar's is registered as soon as it is trained, a pair's when its preview is done or has failed. What no preview has
measured is only `latest`, MLflow's own alias of the newest (champions.py).

The name of a pair's model does not say whose it is where names have hyphens (a-b driven by c, a driven by b-c). So the
registered model carries its pair as tags, and another pair is refused under the same name.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lavatar.contracts import StageKind
from lavatar.errors import JobError
from lavatar.masking import masked
from lavatar.platform.about import About
from lavatar.platform.home import Home
from lavatar.platform.tracking import Tracker, Warn

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")

CHAMPION = "champion"
AVATAR_TAG, ACTOR_TAG = "lavatar.avatar", "lavatar.actor"  # of a registered model
MODEL_TAG = "lavatar."  # what the tags begin with that are ours
STAGE_TAG = "lavatar.stage"  # of a version
MODELS = "lavatar/models"  # experiment of models whose stage has no run
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
    """The same; raises JobError where the name is another pair's, and whatever MLflow raises."""
    _refuse_another_pair(tracker, release)
    return _register(home, tracker, release, run_id)


def attempt(tracker: Tracker, failed: str, action: Callable[[], T], warn: Warn) -> T | None:
    """What `action` does in MLflow, waited for where that is away; None and a warning, beginning `failed`, if it does
    not come to be: the models on disk are not touched by it."""
    tracker.wait()
    try:
        return action()
    except JobError as error:
        warn(f"{error.message}. {error.hint}")
    except Exception as error:  # whatever MLflow raises
        text = masked((str(error).strip().splitlines() or [""])[0])
        warn(f"{failed} in MLflow ({type(error).__name__}: {text}); submit again to retry")
    return None


def _register(home: Home, tracker: Tracker, release: Release, run_id: str | None) -> int:
    import mlflow
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    mlflow.set_tracking_uri(tracker.uri)
    mlflow.set_registry_uri(tracker.uri)
    byte = np.dtype(np.uint8)
    pictures, portrait = (-1, -1, -1, 3), (-1, release.image_size, release.image_size, 3)
    inputs, outputs = Schema([TensorSpec(byte, pictures)]), Schema([TensorSpec(byte, portrait)])
    signature = ModelSignature(inputs=inputs, outputs=outputs)

    def log(copies: Path) -> Any:
        return Model.log(
            artifact_path=None,
            name=release.kind.value,
            flavor=_Unserved,
            validate_serving_input=False,
            python_model=str(Path(__file__).with_name(_SCRIPTS[release.kind])),
            artifacts={path.stem: str(path) for path in copies.iterdir()},
            signature=signature,
            input_example=_example(release),
            registered_model_name=release.name,
            await_registration_for=60,
            pip_requirements=[f"lavatar=={_version()}"],
            metadata={"stage": release.stage_key},
            tags={**release.tags, STAGE_TAG: release.stage_key},
        )

    with tempfile.TemporaryDirectory(prefix="release-", dir=home.root) as scratch:
        for role, folder in release.folders.items():  # MLflow names artefacts by their folders, which are all "release"
            shutil.copytree(folder, Path(scratch) / role, ignore=_links)
        if release.about:
            release.about.write(Path(scratch))
        info = _in_run(tracker, run_id, lambda: log(Path(scratch)))
    version = int(info.registered_model_version)
    for key, value in release.owner.items():
        tracker.client.set_registered_model_tag(release.name, key, value)
    if release.card:
        tracker.client.update_model_version(release.name, str(version), release.card)
    return version


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


class _Unserved:
    """MLflow's pyfunc flavor, without loading each model that was logged to serve its example once."""

    __name__ = "mlflow.pyfunc"

    @staticmethod
    def save_model(*, validate_serving_input: bool, input_example: np.ndarray, **options: Any) -> None:
        """`validate_serving_input` is read by Model.log, which hands it on with the rest.

        The example is written here, as MLflow writes it: its own encoder takes longer than all else that is saved.
        """
        import mlflow.pyfunc
        from mlflow.utils.logging_utils import disable_logging

        mlflow.pyfunc.save_model(**options)
        folder, model, values = Path(options["path"]), options["mlflow_model"], input_example.tolist()
        (folder / "input_example.json").write_text(json.dumps(values))
        (folder / "serving_input_example.json").write_text(json.dumps({"inputs": values}))
        model.saved_input_example_info = {
            "artifact_path": "input_example.json",
            "serving_input_path": "serving_input_example.json",
            "type": "ndarray",
        }
        model.save(str(folder / "MLmodel"))
        disable_logging()  # what comes next is registered, and MLflow announces it; so do we


def _links(folder: str, names: list[str]) -> list[str]:
    """What a copy leaves out: a link in a release could lead to any file of this machine."""
    return [name for name in names if (Path(folder) / name).is_symlink()]


def _refuse_another_pair(tracker: Tracker, release: Release) -> None:
    """JobError where the registered model of this name is another pair's: its champion must not become this one."""
    from mlflow.exceptions import MlflowException

    try:
        tags = tracker.client.get_registered_model(release.name).tags
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return
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


def _in_run(tracker: Tracker, run_id: str | None, log: Callable[[], Any]) -> Any:
    """Log into the stage's run, without leaving any run active in this process, and leave its status as it was."""
    import mlflow

    if run_id is None:  # MLflow's own experiment keeps its files in the current folder
        run_id = tracker.open_stage(MODELS, "model", None, None, {})
    if run_id is None:
        raise JobError("MLflow gives no run to keep the model in", "Submit again to retry.")
    status = tracker.client.get_run(run_id).info.status
    with mlflow.start_run(run_id=run_id):
        info = log()
    tracker.client.set_terminated(run_id, status="FINISHED" if status == "RUNNING" else status)
    return info


def _example(release: Release) -> np.ndarray:
    """One face crop as the model takes it: from the dataset, or grey."""
    size = release.face_size
    if release.faces is not None and (release.faces / "manifest.json").exists():
        from lavatar.datasets.shards import iterate

        sample = next(iter(iterate(release.faces)), None)
        if sample is not None and sample.face.shape == (size, size, 3):
            return np.asarray(sample.face, np.uint8)[None]
    return np.full((1, size, size, 3), 128, np.uint8)


def _version() -> str:
    from importlib.metadata import version

    return version("lavatar")
