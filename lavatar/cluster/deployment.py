"""The files under deploy/, which start a cluster on Kubernetes, in a cloud or under SLURM: written out for editing."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from lavatar.errors import StorageError, UsageError

FOLDER = Path(__file__).parent / "deploy"
KINDS = {
    "aws": ("aws.yaml", "cluster.env"),
    "docker": ("Dockerfile",),
    "gcp": ("gcp.yaml", "cluster.env"),
    "kuberay": ("kuberay/services.yaml", "kuberay/raycluster.yaml", "kuberay/rayjob.yaml"),
    "slurm": ("slurm.sh", "cluster.env"),
}
"""What belongs to what: paths below deploy/."""


def write(kinds: Sequence[str], folder: Path) -> list[Path]:
    """Copies the files of these kinds into `folder`; the copies. Raises UsageError where one is there already."""
    wanted = [Path(name) for name in dict.fromkeys(name for kind in kinds for name in KINDS[kind])]
    present = [str(folder / name) for name in wanted if (folder / name).exists()]
    if present:
        raise UsageError(f"{', '.join(present)} exists already", "Take another folder, or remove what is there.")
    try:
        for name in wanted:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(FOLDER / name, folder / name)
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written: {error.strerror}", "Make it writable, or take another."
        ) from None
    return [folder / name for name in wanted]
