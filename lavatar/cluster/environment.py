"""What every process of lavatar is told before it imports anything else: to write nowhere but into the home, and to
report to nobody. The command line tells itself, Ray's processes inherit it.

What a cluster that is up is told for one job (addresses of databases, keys of stores) may be secret, and Ray shows a
job's environment in its dashboard, its logs and its workers' command lines. So secrets go through a file in the home
that only its owner reads; Ray sees the file's name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from lavatar.errors import StorageError
from lavatar.masking import is_secret

UNREPORTED = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # DeepSpeed imports MLflow too; it would write ~/.config/mlflow
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime would write ~/.cache/Microsoft, as soon as it is imported
    "RAY_USAGE_STATS_ENABLED": "0",
}

HANDED = ("LAVATAR_", "MLFLOW_", "AWS_", "PG")
"""Beginnings of the variables that a job gets from where it was started; all else is the cluster's."""
HANDED_VARIABLE = "LAVATAR_HANDED"
"""Names the file with those that are secret."""
_FOLDER, _ONCE = "handed", "job-"
_WAITED_SECONDS = 86_400.0
FORGOTTEN_SECONDS = 30 * 86_400.0
"""After so long without a sign of life, what lies in a home is nobody's, on whichever machine it was made: the one that
made it may have been started anew since, and then nobody can tell."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def contained(home: Path) -> dict[str, str]:
    """The variables, for this home."""
    folder = Path(home).absolute() / "cache"
    return {
        **UNREPORTED,
        "MPLCONFIGDIR": str(folder / "matplotlib"),  # MediaPipe imports matplotlib
        "TRITON_HOME": str(folder / "triton"),  # DeepSpeed and torch use Triton where there is a GPU
    }


def contain(home: Path) -> None:
    """Set them here, but for what the user has set. Before the libraries are imported."""
    for name, value in contained(home).items():
        os.environ.setdefault(name, value)


def hand_over(home: Path, job: str = "") -> dict[str, str]:
    """What Ray is told of this process's variables for the processes of a cluster: those without a secret, and the name
    of a file (0600) with the others. For all processes of the driver that this process is, or once, for that of `job`.
    """
    values = {k: v for k, v in os.environ.items() if k.startswith(HANDED) and k != HANDED_VARIABLE}
    hidden = {name: value for name, value in values.items() if is_secret(name, value)}
    told = {name: value for name, value in values.items() if name not in hidden}
    if hidden:
        name = f"{_ONCE}{job}-{secrets.token_hex(4)}" if job else f"{host_mark()}-{os.getpid()}"
        told[HANDED_VARIABLE] = str(_write_private(Path(home).absolute() / _FOLDER, f"{name}.json", hidden))
    return told


def _write_private(folder: Path, name: str, values: Mapping[str, str]) -> Path:
    path = folder / name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        _forget_dead(folder)
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            json.dump(values, stream)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}", "Make the home writable.") from None
    return path


def take_over() -> None:
    """The secrets that this process was handed become part of its environment; nothing where none were. Where the file
    is not, for machines need not share the home, those of the machine itself count.

    Ray calls it in each of its processes that works for us, the command line when it begins.
    """
    given = os.environ.pop(HANDED_VARIABLE, "")
    if not given:
        return
    path = Path(given)
    try:
        os.environ.update(json.loads(path.read_text()))
    except FileNotFoundError:
        print(f"{path} is not on this machine: secrets are those of its own environment", file=sys.stderr)
    if path.name.startswith(_ONCE):
        path.unlink(missing_ok=True)


def _forget_dead(folder: Path) -> None:
    """Remove what `left_behind` names."""
    for path in left_behind(folder.parent):
        path.unlink(missing_ok=True)


def left_behind(home: Path) -> list[Path]:
    """Secrets of drivers of this machine that were killed, and those that wait for drivers that never began."""
    found, folder = [], Path(home) / _FOLDER
    for path in sorted(folder.glob(f"{_ONCE}*.json")):
        with contextlib.suppress(FileNotFoundError):  # its driver has it now
            if time.time() - path.stat().st_mtime > _WAITED_SECONDS:
                found.append(path)
    for path in sorted(folder.glob(f"{socket.gethostname()}-*.json")):
        if path.name.startswith(f"{host_mark()}-"):
            gone = not alive(path.stem.rpartition("-")[2])
        else:
            gone = silent(path, FORGOTTEN_SECONDS)
        if gone:
            found.append(path)
    return found


def silent(path: Path, seconds: float) -> bool:
    """Whether nothing was written to that file, or in that folder, for so long."""
    written, inside = 0.0, (Path(folder) / name for folder, _, files in os.walk(path) for name in files)
    for part in (path, *inside):
        with contextlib.suppress(FileNotFoundError):
            written = max(written, part.lstat().st_mtime)
    return time.time() - written > seconds


def this_host() -> str:
    """The machine as far as process numbers mean anything: its name, for people, and a word that differs between
    machines of one name (each start of a kernel has an id) and containers of one machine (each has its own numbers)."""
    name, parts = socket.gethostname(), []
    with contextlib.suppress(OSError):
        parts.append(_BOOT_ID.read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return f"{name} {hashlib.sha256(' '.join(parts).encode()).hexdigest()[:12]}"


def host_mark() -> str:
    """The same in names of files."""
    return this_host().replace(" ", "-")


def alive(pid: int | str) -> bool:
    """Whether there is a process of that number on this machine, or it is no number."""
    try:
        os.kill(int(pid), 0)
    except ValueError:
        return True
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
