"""A version of the model registry into a file (modelfile.py). All of it comes from MLflow, which keeps what was
registered when its stage is long freed."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lavatar.cluster.results import whole
from lavatar.errors import JobError, StorageError, UsageError
from lavatar.masking import masked
from lavatar.platform.about import About, read_about
from lavatar.platform.catalogue import Catalogue
from lavatar.platform.home import Home, size_of
from lavatar.platform.modelfile import ABOUT, CARD, write_model_file
from lavatar.platform.modelregistry import MODEL_TAG
from lavatar.platform.portraits import TAKES
from lavatar.platform.tracking import connect
from lavatar.training.files import file_digest

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

_SEE = "See what there is: lavatar models list"


@dataclass(frozen=True)
class Exported:
    """The file that a version became."""

    model: str
    version: int
    file: Path
    bytes: int
    sha256: str


def export_model(home: Home, named: str, out: Path) -> Exported:
    """Write the version that NAME[@ALIAS|/VERSION] names to `out`. Raises UsageError, JobError, StorageError."""
    out = out.absolute()
    if out.is_dir():
        raise UsageError(f"the output {out} is a folder", f"Name a file: -o {out / 'model.tar'}")
    client = connect(home)
    version = Catalogue(client).version(named.removeprefix("models:/"))
    found = client.get_model_version(version.name, str(version.number))
    with tempfile.TemporaryDirectory(prefix="release-", dir=home.root) as scratch:
        folder = _download(home, found, Path(scratch))
        about = _about(folder, found)
        (folder / CARD).write_text(_card(found, about))
        about.write(folder)
        for role in ("avatar", "pair")[: len(about.people)]:
            if not whole(folder / role):
                raise JobError(
                    f"{_title(found)} is damaged in MLflow: the {role}'s weights do not have their checksum",
                    "Export another version of it, or submit again.",
                )
        write_model_file(out, about.kind, folder)
    return Exported(found.name, int(found.version), out, size_of(out), file_digest(out))


def _download(home: Home, found: ModelVersion, scratch: Path) -> Path:
    """What was registered, in a folder: the releases by role and about.json."""
    import mlflow
    from mlflow.exceptions import MlflowException

    mlflow.set_tracking_uri(home.tracking_uri)
    mlflow.set_registry_uri(home.tracking_uri)
    try:
        uri = f"models:/{found.name}/{found.version}"
        loaded = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(scratch)))
    except (MlflowException, OSError) as error:
        raise StorageError(f"the files of {_title(found)} are not to be had: {masked(str(error))}", _SEE) from error
    folder = scratch / "members"
    shutil.move(loaded / "artifacts", folder)
    return folder


def _about(folder: Path, found: ModelVersion) -> About:
    """What the version says of itself, and its tags."""
    if not (folder / ABOUT).is_file():
        raise JobError(
            f"{_title(found)} was registered by an earlier lavatar, without the recipe that others need",
            f"Run: lavatar models delete {found.name}/{found.version}. Then submit again: it is registered anew.",
        )
    tags = {key: value for key, value in found.tags.items() if key.startswith(MODEL_TAG)}
    return read_about(folder / ABOUT).model_copy(update={"tags": tags})


def _card(found: ModelVersion, about: About) -> str:
    """The version's description, which is its card; the least that is to be said where it has none."""
    whose = " driven by ".join(person.name for person in about.people)
    known = f"Takes {TAKES}.\nRegistered {about.created} by lavatar {about.lavatar}."
    return found.description or f"# {whose}\n\n{known}\n"


def _title(found: ModelVersion) -> str:
    return f"{found.name} version {found.version}"
