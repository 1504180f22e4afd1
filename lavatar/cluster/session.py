"""The local Ray of a foreground submit: started here, reached over loopback with a token, stopped with what it started.

Ray's files lie in HOME/ray (0700: Ray makes its own folders world-writable), or, where the path of its Unix sockets
would grow past what the kernel takes, in a short private folder under the system's temporary one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import secrets
import shutil
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavatar.cluster.environment import (
    FORGOTTEN_SECONDS,
    HANDED_VARIABLE,
    alive,
    contain,
    contained,
    hand_over,
    host_mark,
    silent,
    take_over,
    this_host,
)
from lavatar.errors import UNREADABLE, JobError, LavatarError, StorageError

SOCKET_LIMIT = 107  # bytes in sockaddr_un
SOCKET_NAME = "/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
LOOPBACK = "127.0.0.1"
STARTS = 2  # Ray gives itself 30 seconds, which an overloaded machine may miss
OBJECT_STORE_BYTES = 160 * 2**20
"""Stages hand each other paths, not pictures; the store only carries work lists."""

OPENMP = {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "1000"}
"""How often a thread of a parallel loop looks before it sleeps. GNU's 300,000 make a busy machine ten times slower; the
100 that it takes where there are more threads than CPUs, as in a worker of Ray, cost a quiet one a third of its speed.
Read when torch is loaded, so every process of Ray starts with it."""

ENVIRONMENT = {
    **OPENMP,
    "RAY_AUTH_MODE": "token",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a warning about the next version's default
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process of 3 CPU seconds that has nothing to watch
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # what a worker prints goes to the stage's log
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the end of a training is noticed at the next check
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_task_oom_retries": "0",  # else a task that was killed for want of memory is repeated as it is, for ever
}


@dataclass
class Session:
    """A connection to Ray. `stop` ends what this process started, and only that."""

    address: str
    dashboard: str | None
    owned: bool
    folder: Path | None = None  # Ray's files, if they are ours
    record: Path | None = None  # what is there while it runs

    def stop(self) -> None:
        """Disconnects; a Ray that was started here ends with all its processes and leaves no files."""
        import ray

        if not self.owned:
            return
        with _interrupts_held():
            ray.shutdown()
            if self.record:
                self.record.unlink(missing_ok=True)
            if self.folder:
                remove_ended(self.folder)


def start(home: Path, *, cpus: int | None = None, gpus: int | None = None, dashboard: bool | None = None) -> Session:
    """Starts Ray on this machine, or joins the one this process has already (which then is not ours to stop)."""
    if already_connected():
        return _joined()
    root = private_folder(home)
    prepare_environment(home, token_of(home))
    import ray

    temp = temp_of(root)
    remove_ended(temp)
    options: dict[str, Any] = {"num_gpus": gpus} if gpus is not None else {}
    options["num_cpus"] = cpus or os.cpu_count()
    options["include_dashboard"] = (os.cpu_count() or 1) >= 4 if dashboard is None else dashboard
    for left in reversed(range(STARTS)):
        try:
            context = _init(temp, options)
            break
        except BaseException as error:
            with contextlib.suppress(Exception):
                ray.shutdown()
            remove_ended(temp)
            if isinstance(error, LavatarError) or not isinstance(error, Exception):
                raise
            if left and "timed out" in str(error):
                continue
            raise JobError(
                f"Ray could not be started: {str(error).strip().splitlines()[0]}",
                f"Its logs are in {temp}. Without Ray: --set resources.backend=inline.",
            ) from error
    url = f"http://{context.dashboard_url}" if context.dashboard_url else None
    record = temp / f"session-{os.getpid()}.json"
    record.write_text(json.dumps({"pid": os.getpid(), "address": context.address_info["address"], "dashboard": url}))
    return Session(context.address_info["address"], url, True, temp, record)


def _init(temp: Path, options: dict[str, Any]) -> Any:
    """ray.init of a local Ray with its files in `temp`."""
    import ray

    with _loopback_only(), _sigterm_kept(), _out_of_our_group(), _inherited(network(LOOPBACK)):
        return ray.init(
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
            _temp_dir=str(temp),
            **options,
        )


def network(host: str) -> dict[str, str]:
    """What training processes read to meet at the address `host` of this machine, and to listen nowhere else.

    Without it Gloo takes the address that the machine's name resolves to, which on Debian is one of loopback.
    """
    import psutil

    found = [name for name, every in psutil.net_if_addrs().items() if any(one.address == host for one in every)]
    return {"GLOO_SOCKET_IFNAME": found[0]} if found else {}


def attach(home: Path, address: str) -> Session:
    """Connects to a running cluster; the token is the one Ray's own settings name."""
    if already_connected():
        return _joined()
    for name, value in ENVIRONMENT.items():
        if not name.startswith("RAY_AUTH"):
            os.environ.setdefault(name, value)
    contain(home)
    import ray

    own, handed = {*OPENMP, *contained(home)}, hand_over(home)
    passed = {name: value for name, value in os.environ.items() if name in own or name.startswith("RAY_TRAIN_")}
    passed |= handed
    record = Path(handed[HANDED_VARIABLE]) if HANDED_VARIABLE in handed else None
    told = {"env_vars": passed, "worker_process_setup_hook": f"{take_over.__module__}.{take_over.__name__}"}
    try:
        with _loopback_only() if address.startswith("127.0.0.1:") else contextlib.nullcontext(), _sigterm_kept():
            context: Any = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=told)
    except Exception as error:
        if record:
            record.unlink(missing_ok=True)
        raise JobError(
            f"no Ray cluster at {address}: {str(error).strip().splitlines()[0]}",
            "Check the address and RAY_AUTH_TOKEN_PATH, or leave the address away to use this machine.",
        ) from error
    return Session(address, context.dashboard_url or None, True, record=record)


def already_connected() -> bool:
    """Whether this process has a Ray; does not import it."""
    ray = sys.modules.get("ray")
    return bool(ray is not None and hasattr(ray, "is_initialized") and ray.is_initialized())


def running(home: Path) -> list[str | None]:
    """Each Ray that a job of this home runs now on this machine: the address of its dashboard, None without one; those
    with one first. Imports no ray."""
    found: list[str | None] = []
    for record in sorted(temp_of(root_of(home)).glob("session-*.json")):
        try:
            data = json.loads(record.read_text())
            os.kill(int(data["pid"]), 0)
            dashboard = data["dashboard"]
        except UNREADABLE:
            continue
        found.append(dashboard if isinstance(dashboard, str) else None)
    return sorted(found, key=lambda address: address is None)


def private_folder(home: Path) -> Path:
    """HOME/ray, or a short stand-in for it, readable by its owner only."""
    return _private(root_of(home))


def stand_in(home: Path) -> Path:
    """A private folder of this home under this machine's temporary one: for what cannot lie on a shared disk."""
    return _private(stand_in_of(home))


def root_of(home: Path) -> Path:
    """HOME/ray, or its stand-in; makes nothing."""
    folder = shared_of(home)
    return folder if _fits(folder) else stand_in_of(home)


def stand_in_of(home: Path) -> Path:
    """Where `stand_in` is; makes nothing."""
    name = f"lavatar-{os.getuid()}-{hashlib.sha256(str(shared_of(home)).encode()).hexdigest()[:8]}"
    folder = Path(tempfile.gettempdir()) / name
    return folder if _fits(folder) else Path("/tmp") / name  # TMPDIR is long under some schedulers


def shared_of(home: Path) -> Path:
    """HOME/ray, where all machines that share the home find the token and the record of its cluster."""
    return Path(home).absolute() / "ray"


def _fits(folder: Path) -> bool:
    """Whether the paths of Ray's sockets in there are short enough for the kernel."""
    return len(f"{temp_of(folder)}{SOCKET_NAME}".encode()) <= SOCKET_LIMIT


def _private(folder: Path) -> Path:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.lstat()  # the stand-in's name can be known: others may have put something in its place
        if stat.S_ISLNK(about.st_mode) or about.st_uid != os.getuid():
            whose = "is a link" if stat.S_ISLNK(about.st_mode) else "belongs to another user"
            raise StorageError(f"{folder} {whose}", "Remove it, or choose a shorter LAVATAR_HOME.")
        folder.chmod(0o700)
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror}", "Make it writable or remove it.") from None
    return folder


def token_of(home: Path) -> Path:
    """The file with this user's token, made at the first start; its owner alone may read it, whatever it was before."""
    root = _private(shared_of(home))
    path = root / "token"
    if path.is_symlink():
        raise StorageError(f"{path} is a link", "Remove it: the next start makes a token.")
    if path.exists():
        path.chmod(0o600)
    else:
        partial = root / f".token-{host_mark()}-{os.getpid()}"
        partial.unlink(missing_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, stat.S_IRUSR | stat.S_IWUSR)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):  # another submit was quicker: one token for both
            os.link(partial, path)
        partial.unlink()
    return path


def prepare_environment(home: Path, token: Path) -> None:
    """What Ray and its processes read. Ray looks at it when it is imported, so it is told again if that was before."""
    contain(home)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_TOKEN" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(token))
    if "ray" in sys.modules:
        from ray import _raylet

        raylet: Any = _raylet  # compiled, without types
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Ray listens on 127.0.0.1 alone, as it does by itself on systems where it cannot form clusters."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _inherited(variables: Mapping[str, str]) -> Iterator[None]:
    """What is started meanwhile has these variables, unless they are set already."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself, to exit at once; whoever asked for it before wants to end the job in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not signal.SIG_DFL:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _out_of_our_group() -> Iterator[None]:
    """Ray's processes get a process group of their own: a terminal that closes, or `timeout`, signals our whole group,
    and Ray would be gone before the stages have stored what they have. They still end when this process ends."""
    from ray._private import services as ray_services

    services: Any = ray_services
    before = services.ConsolePopen
    services.ConsolePopen = functools.partial(before, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = before


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """A second Ctrl-C must not cut the stopping short and leave processes behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _joined() -> Session:
    import ray

    return Session(ray.get_runtime_context().gcs_address, None, False)


def temp_of(root: Path) -> Path:
    """Where the Rays of this machine's jobs keep their files: process numbers mean nothing on another one."""
    return root / f"t{hashlib.sha256(this_host().encode()).hexdigest()[:4]}"


def forgotten(root: Path) -> list[Path]:
    """Such folders of other machines, or of this one before it was started anew, of which no Ray writes its logs."""
    others = [temp for temp in sorted(root.glob(f"t{'[0-9a-f]' * 4}")) if temp.is_dir() and temp != temp_of(root)]
    return [temp for temp in others if silent(temp, FORGOTTEN_SECONDS)]


def ended(temp: Path) -> list[Path]:
    """Folders of Ray sessions whose process is gone (its number ends the name), and the link to the latest of them."""
    folders = [path for path in sorted(temp.glob("session_*_*")) if not path.is_symlink()]
    found, latest = [path for path in folders if not alive(path.name.rpartition("_")[2])], temp / "session_latest"
    leads_nowhere = latest.is_symlink() and (not latest.exists() or latest.resolve().name in {p.name for p in found})
    return [*found, latest] if leads_nowhere else found


def remove_ended(temp: Path) -> None:
    """The folders of ended sessions, and those of this process, and the records of the ended ones."""
    for record in temp.glob("session-*.json"):
        if not alive(record.stem.rpartition("-")[2]):
            record.unlink(missing_ok=True)
    for folder in (*ended(temp), *temp.glob(f"session_*_{os.getpid()}")):
        shutil.rmtree(folder, ignore_errors=True)  # leaves a link alone
    latest = temp / "session_latest"
    if latest.is_symlink() and not latest.exists():
        latest.unlink(missing_ok=True)
