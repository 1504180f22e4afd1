"""Checkpoints: safetensors and JSON, no pickle. A folder counts only with its COMPLETE.json, renamed into place last.

DIR/step-00000500/modules.safetensors     every parameter and buffer by name
                  optimizer.safetensors   exp_avg/NAME, exp_avg_sq/NAME, step/NAME: whole tensors, any world size
                  rng.safetensors         generators of each worker: torch/R, cuda/R, numpy/R, python/R
                  task.safetensors        what the task adds
                  state.json              step, sampler position, world size, configuration
                  COMPLETE.json           SHA-256 and size of each of the above
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from lavatar.errors import CheckpointError
from lavatar.training.files import file_digest, storage_errors, sync, write_json

FORMAT = 1
MARKER = "COMPLETE.json"
KEEP = 2
TENSOR_FILES = ("modules", "optimizer", "rng", "task")
FILES = (*(f"{name}.safetensors" for name in TENSOR_FILES), "state.json")


@dataclass(frozen=True)
class Checkpoint:
    """What training needs to go on as if it had never stopped. Tensors on the CPU."""

    step: int
    modules: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    rng: Mapping[str, Tensor] = field(default_factory=dict)
    task: Mapping[str, Tensor] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)  # sampler position, world, configuration: JSON values


@dataclass(frozen=True)
class Damaged:
    """A checkpoint that cannot be used, and why."""

    folder: Path
    reason: str


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes `checkpoint` under `folder`, then removes all but the newest two.

    Raises StorageError when the disk is full or not writable; older checkpoints are untouched by that.
    """
    target = folder / f"step-{checkpoint.step:08d}"
    with storage_errors(target):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)  # an unfinished or damaged one of the same step
        target.mkdir()
        try:
            _write_files(target, checkpoint)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
    _prune(folder)
    return target


def _write_files(target: Path, checkpoint: Checkpoint) -> None:
    """All files, their checksums, then the marker."""
    parts = (checkpoint.modules, checkpoint.optimizer, checkpoint.rng, checkpoint.task)
    for name, tensors in zip(TENSOR_FILES, parts, strict=True):
        safetensors.torch.save_file(dict(tensors), target / f"{name}.safetensors")
    state = {"format": FORMAT, "step": checkpoint.step, **checkpoint.info}
    (target / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True))
    sums = {}
    for path in sorted(target.iterdir()):
        sync(path)
        sums[path.name] = {"sha256": file_digest(path), "bytes": path.stat().st_size}
    write_json(target / MARKER, {"format": FORMAT, "step": checkpoint.step, "files": sums})


def latest(folder: Path) -> tuple[Path | None, list[Damaged]]:
    """The newest undamaged checkpoint, its sums checked, and the newer ones that are damaged."""
    damaged: list[Damaged] = []
    for path in _newest_first(folder):
        reason = defect(path)
        if reason is None:
            return path, damaged
        damaged.append(Damaged(path, reason))
    return None, damaged


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint folder that `latest` named."""
    try:
        state = json.loads((path / "state.json").read_text())
        parts = [safetensors.torch.load_file(path / f"{name}.safetensors") for name in TENSOR_FILES]
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}", f"Remove {path} and repeat.") from None
    if not isinstance(state, dict) or state.pop("format", None) != FORMAT:
        raise CheckpointError(f"checkpoint {path} has another format", f"Remove {path.parent} to train anew.")
    step = state.pop("step", None)
    if not isinstance(step, int) or step < 0:
        raise CheckpointError(f"checkpoint {path} says no step", f"Remove {path} and repeat.")
    modules, optimizer, rng, task = parts
    return Checkpoint(step, modules, optimizer, rng, task, state)


def defect(path: Path) -> str | None:
    """Why the checkpoint in `path` cannot be used; None if it is whole."""
    try:
        files = json.loads((path / MARKER).read_text())["files"]
        wanted = {name: (int(files[name]["bytes"]), str(files[name]["sha256"])) for name in FILES}
    except FileNotFoundError:
        return f"unfinished: no {MARKER}"
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        return f"{MARKER} is not readable: {type(error).__name__}: {error}"
    for name, (length, digest) in wanted.items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            return f"{name} is missing"
        size = file.stat().st_size
        if size != length:
            return f"{name} has {size} bytes, not {length}"
        if file_digest(file) != digest:
            return f"{name} does not have its checksum"
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), reverse=True)


def _prune(folder: Path) -> None:
    """Keeps the newest two finished ones; removes unfinished ones older than those."""
    finished = 0
    for path in _newest_first(folder):
        if finished >= KEEP:
            shutil.rmtree(path, ignore_errors=True)
        finished += (path / MARKER).is_file()
