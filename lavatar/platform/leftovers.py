"""What a process that died left in a home: half-written datasets, temporary files, what trials left, Ray's files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lavatar.cluster import head, node, session
from lavatar.cluster.environment import alive, host_mark, left_behind
from lavatar.datasets import shards
from lavatar.errors import DataError
from lavatar.platform import sweeps
from lavatar.platform.findings import Finding, Place
from lavatar.platform.home import KEY, Home, size_of, size_text
from lavatar.platform.usage import Usage

PARTS = ("*.part", "*.partial")
"""Names under which things are written until they are whole."""
WRITTEN_TO = ("shards", "checkpoints", "outputs", "videos", "reproductions", "logs", "sweeps")


@dataclass(frozen=True)
class Leftover:
    """A file or folder that nothing uses any more; `key` is the stage that made it, None if none did."""

    what: str
    path: Path
    key: str | None = None

    def remove(self) -> None:
        """Raises OSError."""
        if self.path.is_dir() and not self.path.is_symlink():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)


def half_written(place: Place) -> Iterator[Finding]:
    """Datasets without a manifest that hold more than whole segments, which the next preprocessing takes up."""
    from lavatar.datasets.salvage import remains, tidy

    for folder in place.home.stage_dirs():
        if folder.parent.name != "shards" or (folder / shards.MANIFEST).exists() or place.usage.user_of(folder.name):
            continue
        found = remains(folder)
        if found.whole and not found.useless:
            continue
        kept = f"{len(found.whole)} whole segments are kept for the next submit" if found.whole else "nothing is whole"
        parts = len(found.useless)
        text = f"dataset {folder.name[:8]} is half-written: {parts} unfinished {'file' if parts == 1 else 'files'}"
        yield place.finding(folder.name, text, folder, f"the rest is removed, {kept}", partial(tidy, folder))


def abandoned(place: Place) -> Iterator[Finding]:
    """Temporary files and Ray's folders whose processes are gone."""
    for left in leftovers(place.home, place.usage):
        size = size_text(size_of(left.path))
        yield place.finding(left.key, f"{left.what} ({size})", left.path, "it is removed", left.remove)


def leftovers(home: Home, usage: Usage) -> list[Leftover]:
    """All of them, but for those of a stage that somebody uses, and those of no stage while somebody works at all."""
    found = [*_parts(home), *_scratch(home), *_sweeps(home), *_ray(home)]
    return [left for left in found if usage.user_of(left.key) is None]


def _parts(home: Home) -> Iterator[Leftover]:
    """What was to be renamed. What lies in a half-written dataset is that dataset's."""
    for name in WRITTEN_TO:
        for folder, folders, files in os.walk(home.root / name):
            here = Path(folder)
            if name == "shards" and here.parent.name == name and not (here / shards.MANIFEST).exists():
                folders.clear()
                continue
            for part in sorted(entry for entry in (*folders, *files) if any(Path(entry).match(p) for p in PARTS)):
                yield Leftover("temporary file of a process that is gone", here / part, _key(here / part))
            folders[:] = [entry for entry in folders if not any(Path(entry).match(p) for p in PARTS)]


def _key(path: Path) -> str | None:
    """The stage in a path: a folder of its name, or `.KEY.PID.part`."""
    for part in path.parts:
        words = [word for word in part.split(".") if KEY.fullmatch(word)]
        if words:
            return words[0]
    return None


def _scratch(home: Home) -> Iterator[Leftover]:
    """Copies that were being registered as models, and what was handed to processes."""
    for path in sorted(home.root.glob("release-*")):
        yield Leftover("copy of a model that was being registered", path)
    for path in left_behind(home.root):
        yield Leftover("secrets handed to a process that is gone", path)


def _sweeps(home: Home) -> Iterator[Leftover]:
    """Of sweeps that nobody runs: what trials worked in, the state of one that is done, a folder without a sweep."""
    for folder in sorted(path for path in (home.root / "sweeps").glob("[!.]*") if path.is_dir()):
        if sweeps.running(folder):
            continue
        if not (folder / sweeps.DEFINITION).exists() and not (folder / sweeps.TRIALS).exists():
            yield Leftover("folder of a sweep that never began", folder)
            continue
        if (folder / sweeps.WORK).exists():
            yield Leftover("what trials of a sweep worked in, whose process is gone", folder / sweeps.WORK)
        if (folder / sweeps.TUNE).exists() and _done(folder):
            yield Leftover("state of a sweep that is done", folder / sweeps.TUNE)


def _done(folder: Path) -> bool:
    """Whether no trial is left to take up; of a damaged sweep nobody knows."""
    try:
        return not sweeps.left(sweeps.read(folder), sweeps.read_trials(folder))
    except DataError:
        return False


def _ray(home: Home) -> Iterator[Leftover]:
    """Of Rays that jobs started; of a cluster that is up nothing is."""
    root, shared = session.root_of(home.root), session.shared_of(home.root)
    for path in (*session.ended(session.temp_of(root)), *session.forgotten(root)):
        yield Leftover("files of a Ray whose process is gone", path)
    if not (shared / head.RECORD).exists() and not head.running_here(home.root):
        for path in [ended for folder in node.folders(home.root) for ended in session.ended(folder)]:
            yield Leftover("files of a cluster that is gone", path)
    for path in sorted(session.temp_of(root).glob("session-*.json")):
        if not alive(path.stem.rpartition("-")[2]):
            yield Leftover("record of a Ray whose process is gone", path)
    for path in sorted((shared / "train").glob("*")):
        yield Leftover("files of a training whose process is gone", path)
    for path in sorted(shared.glob(f".token-{host_mark()}-*")):
        if not alive(path.name.rpartition("-")[2]):
            yield Leftover("temporary file of a process that is gone", path)
