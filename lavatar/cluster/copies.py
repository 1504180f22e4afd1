"""What of a stage lies on this disk: whether it is whole, as far as checksums that lie beside it tell."""

from __future__ import annotations

from pathlib import Path

from lavatar.cluster.results import NAME, whole
from lavatar.errors import ShardError

DATASET = "manifest.json"
MARKERS = (DATASET, "config.json", NAME)
"""Written last in the folders that stages leave: a dataset, a released model, a preview."""


def there(folder: Path) -> bool:
    """Whether a stage's folder, dataset, release or preview, is on this disk and whole."""
    return defect(folder) is None


def defect(folder: Path) -> str | None:
    """Why a stage's folder cannot be used from this disk, naming what is damaged; "" where it is not there, None where
    it is whole. Tars and weights are read through."""
    if not any((folder / marker).is_file() for marker in MARKERS):
        return ""
    if (folder / DATASET).is_file():
        return _dataset_defect(folder)
    return None if whole(folder) else f"{folder}: the weights do not have the checksum that config.json says"


def _dataset_defect(folder: Path) -> str | None:
    from lavatar.datasets.shards import verify

    try:
        verify(folder)
    except ShardError as error:
        return error.message
    return None


def take_away_damaged(folder: Path) -> bool:
    """Make a dataset an unfinished one if it is damaged: its whole segments are taken up again. Whether it was."""
    if not _dataset_defect(folder):
        return False
    from lavatar.datasets.preprocess import clean_folder
    from lavatar.datasets.salvage import take_apart

    try:
        take_apart(folder)
    except ShardError:  # the manifest itself: nothing tells which tars are whole
        clean_folder(folder)
    return True
