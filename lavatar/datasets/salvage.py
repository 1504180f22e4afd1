"""What is left of a dataset after a crash or on a bad disk: whole segments are kept for the next preprocessing, which
takes them up (lavatar.datasets.preprocess), and the rest is removed."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from lavatar.datasets import shards
from lavatar.datasets.preprocess import DIGEST, WORK, kept_segment


@dataclass(frozen=True)
class Remains:
    """Of a folder without a manifest: segments that can be taken up, and files and folders that nothing can use."""

    whole: tuple[str, ...]
    useless: tuple[Path, ...]


def remains(folder: Path) -> Remains:
    """What an attempt that did not end left in `folder`. Every whole segment is read through."""
    work = folder / WORK
    useless = [path for path in sorted(folder.iterdir()) if path.name != WORK]
    if not (work / DIGEST).is_file():
        return Remains((), (*useless, work) if work.is_dir() else tuple(useless))
    whole = [path.stem for path in sorted(work.glob("*.json")) if kept_segment(work, path.stem)]
    kept = {DIGEST, *(f"{name}{end}" for name in whole for end in (".json", ".tar"))}
    return Remains(tuple(whole), (*useless, *(path for path in sorted(work.iterdir()) if path.name not in kept)))


def tidy(folder: Path) -> int:
    """Remove what nothing can use; the folder too if no whole segment is left. How many segments are kept."""
    found = remains(folder)
    with shards.storage_errors(folder):
        for path in found.useless if found.whole else (folder,):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    return len(found.whole)


def take_apart(folder: Path) -> int:
    """Make a damaged dataset an unfinished one, without its damaged tars; how many segments the next attempt takes up.

    A drawn subject has none to take up: it is drawn again. Raises ShardError where even the manifest is damaged.
    """
    manifest = shards.read_manifest(folder)
    work = folder / WORK
    with shards.storage_errors(folder):
        if manifest.kind == "synthetic":
            shutil.rmtree(folder)
            return 0
        whole = [tar for tar in manifest.tars if shards.defect(folder, tar) is None]
        work.mkdir(exist_ok=True)
        (work / DIGEST).write_text(manifest.digest)
        (folder / shards.MANIFEST).unlink()  # from here on it is no dataset
        for tar in whole:
            os.replace(folder / tar["name"], work / tar["name"])
            (work / tar["name"]).with_suffix(".json").write_text(json.dumps(tar))
    return tidy(folder)
