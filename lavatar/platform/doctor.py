"""Checks of this machine: what lavatar needs, what is there, and what to do about the difference."""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
from dataclasses import dataclass
from importlib import metadata

from lavatar.errors import LavatarError
from lavatar.platform.home import REGISTRY_VARIABLE, Home, size_text

LIBRARIES = {
    "libGL.so.1": "libgl1",
    "libEGL.so.1": "libegl1",
    "libGLESv2.so.2": "libgles2",
    "libxcb.so.1": "libxcb1",
    "libgthread-2.0.so.0": "libglib2.0-0",
}
"""Shared libraries that the wheels of OpenCV and MediaPipe link, and the Debian packages that hold them."""

PACKAGES = (
    "torch", "ray", "mlflow", "deepspeed", "webdataset", "opencv-python", "mediapipe", "onnxruntime", "av",
    "face-alignment", "lpips", "sqlalchemy", "alembic", "click", "pydantic", "safetensors", "rich", "fsspec",
)  # fmt: skip
LITTLE_SPACE = 5_000_000_000


@dataclass(frozen=True)
class Check:
    """One line: ok, warning (some of it will not work) or error (nothing will)."""

    name: str
    state: str
    text: str
    hint: str = ""


def examine(home: Home, *, ray: bool = False) -> list[Check]:
    """All checks, in the order in which things are needed."""
    checks = [
        python(),
        packages(),
        libraries(),
        home_folder(home),
        disk(home),
        registry(home),
        *store(home),
        weights(),
        accelerator(),
    ]
    return [*checks, ray_start(home)] if ray else checks


def python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] == (3, 11):
        return Check("python", "ok", version)
    return Check("python", "error", f"{version}, lavatar runs on 3.11", "Make the virtual environment with python3.11.")


def packages() -> Check:
    missing, found = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Check("packages", "error", f"missing: {', '.join(missing)}", "pip install -c constraints.txt .")
    return Check("packages", "ok", ", ".join(found[:4]) + f" and {len(found) - 4} more")


def libraries() -> Check:
    missing = {name: package for name, package in LIBRARIES.items() if not _loads(name)}
    if missing:
        command = f"apt-get install {' '.join(missing.values())}"
        return Check("system libraries", "error", f"missing: {', '.join(missing)}", f"On Debian or Ubuntu: {command}")
    return Check("system libraries", "ok", ", ".join(LIBRARIES))


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def home_folder(home: Home) -> Check:
    try:
        home.ensure()
        probe = home.root / ".doctor"
        probe.write_text("")
        probe.unlink()
    except LavatarError as error:
        return Check("home", "error", error.message, error.hint)
    except OSError as error:
        return Check("home", "error", f"{home.root}: {error}", "Make it writable, or set LAVATAR_HOME.")
    return Check("home", "ok", str(home.root))


def disk(home: Home) -> Check:
    free = home.free_bytes()
    if free < LITTLE_SPACE:
        return Check(
            "disk", "warning", f"{size_text(free)} free", "Free some space, or set LAVATAR_HOME to another disk."
        )
    return Check("disk", "ok", f"{size_text(free)} free")


def registry(home: Home) -> Check:
    from lavatar.platform.registry import HEAD, open_registry, schema_revision

    try:
        before = schema_revision(home)
        open_registry(home).close()
    except LavatarError as error:
        return Check("registry", "error", error.message, error.hint or f"Correct or unset {REGISTRY_VARIABLE}.")
    made = "" if before == HEAD else f", brought from {before or 'nothing'}"
    return Check("registry", "ok", f"revision {HEAD}{made}")


def store(home: Home) -> list[Check]:
    """One where LAVATAR_STORE is set."""
    try:
        found = home.store()
        if found is None:
            return []
        found.check()
    except LavatarError as error:
        return [Check("store", "error", error.message, error.hint)]
    return [Check("store", "ok", found.objects.url)]


def weights() -> Check:
    from lavatar.datasets.weights import status

    rows = status()
    wrong = [row["name"] for row in rows if row["state"] != "present"]
    if wrong:
        hint = f"Synthetic subjects need none. Get them with: lavatar weights fetch {' '.join(wrong)}"
        return Check("weights", "warning", f"missing or wrong: {', '.join(wrong)}", hint)
    return Check("weights", "ok", ", ".join(row["name"] for row in rows))


def accelerator() -> Check:
    import torch

    if torch.cuda.is_available():
        return Check("accelerator", "ok", f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}")
    return Check("accelerator", "ok", f"none; {torch.get_num_threads()} CPU threads: use --recipe tiny")


def ray_start(home: Home) -> Check:
    """Start what a job starts, and stop it again."""
    from lavatar.cluster.stages import StageRunner

    try:
        with StageRunner(home.root, backend="ray"):
            pass
    except LavatarError as error:
        return Check("ray", "error", error.message, error.hint)
    except Exception as error:
        return Check("ray", "error", f"{type(error).__name__}: {error}", "Run it again with --debug.")
    return Check("ray", "ok", "started and stopped")
