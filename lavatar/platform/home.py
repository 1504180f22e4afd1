"""LAVATAR_HOME: the one folder that lavatar writes to (the weights cache apart), and what lies where in it."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lavatar.contracts import StageKind
from lavatar.errors import StorageError
from lavatar.training.files import exclusive

if TYPE_CHECKING:
    from lavatar.cluster.store import Store

HOME_VARIABLE = "LAVATAR_HOME"
REGISTRY_VARIABLE = "LAVATAR_REGISTRY"
TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"

KEY = re.compile(r"[0-9a-f]{64}")
"""How a stage is called, and its folder."""

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")  # MLflow would keep their artefacts in the current folder
_FOLDERS = ("shards", "checkpoints", "outputs", "ray", "logs", "mlartifacts")
_UNSENT = ".unsent.jsonl"
_FOLDER_OF_KIND = {
    StageKind.PREPROCESS: "shards",
    StageKind.AVATAR: "checkpoints",
    StageKind.PAIR: "checkpoints",
    StageKind.SHARED: "checkpoints",
    StageKind.PREVIEW: "outputs",
}


@dataclass(frozen=True)
class Home:
    """Paths below the home folder, and the two databases' addresses."""

    root: Path

    @classmethod
    def from_environment(cls) -> Home:
        """LAVATAR_HOME, else ~/.lavatar; absolute."""
        given = os.environ.get(HOME_VARIABLE, "").strip()
        return cls(Path(given or "~/.lavatar").expanduser().absolute())

    @property
    def registry_url(self) -> str:
        """LAVATAR_REGISTRY (any SQLAlchemy address), else SQLite in the home."""
        return os.environ.get(REGISTRY_VARIABLE, "").strip() or f"sqlite:///{self.root / 'registry.db'}"

    def store(self) -> Store | None:
        """Where the results of stages are kept for other nodes: LAVATAR_STORE (any fsspec address); None: here alone.
        Raises ConfigError."""
        from lavatar.cluster.store import open_store

        return open_store(self.root)

    def fetch(self, *folders: Path | None) -> None:
        """These results from the store, where they are not on this disk. Raises DataError, StorageError."""
        store = self.store()
        for folder in folders:
            if store is not None and folder is not None:
                store.fetch(folder)

    @property
    def tracking_uri(self) -> str:
        """MLFLOW_TRACKING_URI, else SQLite in the home."""
        return os.environ.get(TRACKING_VARIABLE, "").strip() or f"sqlite:///{self.root / 'mlflow.db'}"

    @property
    def keeps_artifacts(self) -> bool:
        """Whether MLflow is a database without a server: its artefacts are then the home's to keep.

        Told from the address, not from the environment: `mlflow.set_tracking_uri` writes the variable too.
        """
        return self.tracking_uri.partition("://")[0].partition("+")[0] in _DATABASES

    @property
    def mlartifacts(self) -> Path:
        return self.root / "mlartifacts"

    def identity(self) -> str:
        """A name that no other home has, made at first use: it marks what lies elsewhere and belongs here.

        Raises StorageError when the home cannot be written.
        """
        self.ensure()
        with (self.root / "id").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            name = file.read().strip()
            if not name:
                name = uuid.uuid4().hex
                file.write(name)
            return name

    def stage_dirs(self) -> Iterator[Path]:
        """Every folder that a stage made, named by its key."""
        for name in sorted(set(_FOLDER_OF_KIND.values())):
            for folder in sorted((self.root / name).glob("*")):
                if folder.is_dir() and KEY.fullmatch(folder.name):
                    yield folder

    def out_dir(self, kind: StageKind, key: str) -> Path:
        """Where a stage's result lies: its kind's folder, its key."""
        return self.root / _FOLDER_OF_KIND[kind] / key

    def unsent(self, run_id: str) -> Path:
        """Where values wait for an MLflow that is away (sink.py)."""
        return self.root / "logs" / f"{run_id}{_UNSENT}"

    def unsent_files(self) -> dict[str, Path]:
        """All of these, by their runs."""
        found = sorted((self.root / "logs").glob(f"*{_UNSENT}"))
        return {path.name.removesuffix(_UNSENT): path for path in found if not path.name.startswith(".")}

    def evaluation_dir(self, avatar: str, actor: str | None) -> Path:
        """Where `lavatar evaluate` writes unless it is told otherwise."""
        return self.root / "outputs" / "evaluation" / (avatar if actor is None else f"{avatar}_{actor}")

    def report_path(self, name: str) -> Path:
        """Where `lavatar report` and `compare` write unless they are told otherwise."""
        return self.root / "outputs" / "report" / f"{name}.html"

    def relative(self, path: Path) -> str:
        """`path` as it is remembered: relative when inside the home, so that a home can be moved."""
        absolute = Path(os.path.abspath(path))
        root = os.path.abspath(self.root)
        return str(absolute.relative_to(root)) if absolute.is_relative_to(root) else str(absolute)

    def absolute(self, remembered: str) -> Path:
        """The reverse of `relative`. Raises StorageError for a path that leads out of the home: nobody wrote it."""
        path = self.root / remembered
        if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(self.root)):
            raise StorageError(
                f"the registry names a file outside of the home {self.root}: {remembered[:200]!r}",
                "Somebody changed the registry, or it is another home's: lavatar doctor",
            )
        return path

    def ensure(self) -> Home:
        """Make the folders. Raises StorageError when the home cannot be written."""
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)  # pictures of people: not for everybody's eyes
            for name in _FOLDERS:
                (self.root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"the home folder {self.root} cannot be written: {error.strerror or error}",
                f"Make it writable, or set {HOME_VARIABLE} to a folder that is.",
            ) from error
        if not os.access(self.root, os.W_OK):
            raise StorageError(
                f"the home folder {self.root} cannot be written: no permission",
                f"Make it writable, or set {HOME_VARIABLE} to a folder that is.",
            )
        return self

    def free_bytes(self) -> int:
        """Free space on the home's disk, in bytes."""
        folder = next(p for p in (self.root, *self.root.parents) if p.exists())
        return shutil.disk_usage(folder).free

    def require_space(self, needed: int) -> None:
        """Raises StorageError when fewer than `needed` bytes are free."""
        free = self.free_bytes()
        if free < needed:
            raise StorageError(
                f"the disk of {self.root} has {size_text(free)} free, this job needs about {size_text(needed)}",
                f"Free some space, or set {HOME_VARIABLE} to a folder on a larger disk.",
            )


def size_text(count: int) -> str:
    """Bytes for people: '3.4 GB'."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; links are not followed."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size if path.is_symlink() or path.exists() else 0
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


@contextmanager
def working_in(home: Home) -> Iterator[None]:
    """For a command that works in the home without being a job: meanwhile nothing there is mended or freed."""
    with exclusive(home.root / "use.lock", shared=True):
        yield


@contextmanager
def alone_in(home: Home) -> Iterator[bool]:
    """Whether no command is `working_in` the home; if so, none begins before this ends."""
    home.ensure()
    with (home.root / "use.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True  # closing the file frees the lock
