"""What no job refers to: found with its size, and freed.

A job needs its stages, the pair that one of its own began at, and the videos of its people. What is registered in
MLflow is complete there, and stays. What benchmarks, sweeps, evaluations, reproductions and reenactments wrote into the
home is the user's; of sweeps that were deleted the MLflow runs are freed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import delete, select

from lavatar.errors import JobError, LavatarError
from lavatar.platform import runs, uploads
from lavatar.platform.home import KEY, Home, size_of
from lavatar.platform.leases import owner_alive
from lavatar.platform.leftovers import leftovers
from lavatar.platform.registry import Registry, hold_stages
from lavatar.platform.states import State
from lavatar.platform.tables import Artefact, Dataset, Stage
from lavatar.platform.unsent import forgotten
from lavatar.platform.usage import Usage, benchmarked, needed, undisturbed, unneeded, usage_of


@dataclass(frozen=True)
class Item:
    """One thing that can be freed: what it is, where, its bytes. `free` says whether it still could be."""

    what: str
    where: str
    bytes: int
    free: Callable[[], bool] = field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        return {"what": self.what, "where": self.where, "bytes": self.bytes}


def garbage(home: Home, registry: Registry, warn: Callable[[str], None]) -> list[Item]:
    """Everything that can be freed now."""
    usage = usage_of(home, registry)
    items = list(_leftovers(home, registry, usage))
    going = [] if usage.others else _unneeded_stages(home, registry)
    if not usage.others:
        items += [*_stages(home, registry, going), *_strays(home, registry), *_videos(home, registry)]
    items += _unsent(home, registry, usage)
    return [*items, *_runs(home, registry, {stage.key for stage in going}, warn)]


def freed(item: Item, warn: Callable[[str], None]) -> bool:
    """Free it. False where it is needed or used again, or where that failed, which is told."""
    try:
        return item.free()
    except LavatarError as error:
        warn(f"{item.what} is not freed: {error.message}")
    except OSError as error:
        warn(f"{item.what} is not freed: {error.filename or item.where}: {error.strerror or error}")
    return False


def _unneeded_stages(home: Home, registry: Registry) -> list[Stage]:
    """Stages that no job needs and no benchmark shows."""
    shown = benchmarked(home)
    with registry.read() as session:
        return [stage for stage in unneeded(session) if stage.key not in shown]


def _stages(home: Home, registry: Registry, rows: list[Stage]) -> Iterator[Item]:
    """Rows with their folders and logs."""
    store = home.store()
    for stage in rows:
        paths = [home.absolute(stage.out_dir), _log(home, stage.key)]
        size = sum(size_of(path) for path in paths) + (store.size_of(stage.key) if store else 0)
        yield Item(f"{stage!r}", str(paths[0]), size, partial(_free, home, registry, stage.key, paths))


def _strays(home: Home, registry: Registry) -> Iterator[Item]:
    """Folders and logs of stages that the registry does not know, but for what benchmarks show."""
    with registry.read() as session:
        known = set(session.scalars(select(Stage.key))) | benchmarked(home)
    folders = [folder for folder in home.stage_dirs() if folder.name not in known]
    logs = [path for path in sorted((home.root / "logs").glob("*.log")) if KEY.fullmatch(path.stem)]
    for path in (*folders, *(log for log in logs if log.stem not in known)):
        key = path.stem
        what = f"{'log' if path.suffix else path.parent.name} of a stage that is not registered ({key[:8]})"
        yield Item(what, str(path), size_of(path), partial(_free, home, registry, key, [path]))


def _log(home: Home, key: str) -> Path:
    return home.root / "logs" / f"{key}.log"


def _free(home: Home, registry: Registry, key: str, paths: list[Path]) -> bool:
    """Forget the stage and put its files aside in one transaction, in which nobody plans it; then remove them."""
    with undisturbed(home, registry) as usage:
        usage.require_free(key)
        with registry.write() as session:
            hold_stages(session, freeing=True)
            stage = session.get(Stage, key, with_for_update=True)
            if needed(session, key) or (stage and stage.state == State.RUNNING and owner_alive(stage)):
                return False
            session.execute(delete(Artefact).where(Artefact.stage_key == key))
            session.execute(delete(Dataset).where(Dataset.key == key))
            store = home.store() if stage else None  # what is no stage of this registry may be another one's there
            if stage:
                session.delete(stage)
            session.flush()
            if store:
                store.forget(key)
            aside = [part for path in paths if (part := _put_aside(path))]
        for part in aside:
            shutil.rmtree(part) if part.is_dir() else part.unlink()
    return True


def _put_aside(path: Path) -> Path | None:
    """Under a name that is a leftover if this process dies now. None if there is nothing."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        os.replace(path, part)
    except FileNotFoundError:
        return None
    return part


def _leftovers(home: Home, registry: Registry, usage: Usage) -> Iterator[Item]:
    for left in leftovers(home, usage):

        def free(left: Any = left) -> bool:
            with undisturbed(home, registry) as now:
                now.require_free(left.key)
                left.remove()
            return True

        yield Item(left.what, str(left.path), size_of(left.path), free)


def _unsent(home: Home, registry: Registry, usage: Usage) -> Iterator[Item]:
    """Values that were to be sent to MLflow runs that are gone."""
    for one in forgotten(home, registry, usage):

        def free(path: Path = one.path) -> bool:
            with undisturbed(home, registry) as now:
                now.require_free(None)
                path.unlink(missing_ok=True)
            return True

        yield Item(f"values for an MLflow run that is gone ({one.run_id[:8]})", str(one.path), size_of(one.path), free)


def _videos(home: Home, registry: Registry) -> Iterator[Item]:
    """Videos that no subject and no job has: what this registry's jobs stored, and the home's copies."""
    store = home.store()
    copies = {path.name: path for path in (home.root / "videos").glob("*") if KEY.fullmatch(path.name)}
    with registry.read() as session:
        stored = uploads.uploaded(session) if store else set()
        unnamed = [digest for digest in sorted(stored | set(copies)) if not uploads.named(session, digest)]
    for digest in unnamed:
        free, what = partial(_free_video, home, registry, digest), f"video of nobody ({digest[:8]})"
        if digest in copies:
            yield Item(what, str(copies[digest]), size_of(copies[digest]), partial(free, copies[digest]))
        size = store.video_size(digest) if store and digest in stored else None
        if store and size is not None:
            yield Item(what, f"{store.objects.url}/videos/{digest}", size, partial(free, None))


def _free_video(home: Home, registry: Registry, digest: str, copy: Path | None) -> bool:
    """The copy, or what is stored, in one transaction in which nobody adds the person or plans a job with them."""
    with undisturbed(home, registry) as usage:
        usage.require_free(digest)
        with registry.write() as session:
            hold_stages(session, freeing=True)
            if uploads.named(session, digest):
                return False
            store = home.store()
            if copy is None and store is not None:
                store.forget_video(digest)
                uploads.forget(session, digest)
            aside = _put_aside(copy) if copy else None
        if aside:
            shutil.rmtree(aside)
    return True


def _runs(home: Home, registry: Registry, going: set[str], warn: Callable[[str], None]) -> Iterator[Item]:
    """MLflow runs of jobs and stages that are gone, or that go before them (keys)."""
    try:
        found = runs.unreferenced(home, registry, going)
    except JobError as error:
        warn(f"{error.message}: its runs are left")
        return
    for run in found:
        folders = runs.folders_of(home, run)

        def free(run: Any = run, folders: list[Path] = folders) -> bool:
            if runs.referenced(registry, run):  # its stage was not freed
                return False
            runs.delete_run(home, run)
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
            return True

        text = f"MLflow run {run.info.run_name!r} ({run.info.run_id[:8]})"
        yield Item(text, home.tracking_uri, sum(size_of(folder) for folder in folders), free)
