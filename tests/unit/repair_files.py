"""Homes for the tests of repair and gc: stages whose files are real (tars, checkpoints, released models, sums)."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import lavatar.datasets.salvage  # noqa: F401  (before a test replaces what it imports)
from lavatar.contracts import NullSink, StageKind, StageResult
from lavatar.platform.findings import Outcome
from lavatar.platform.home import Home
from lavatar.platform.repair import inspect
from lavatar.training import checkpoint as checkpoints
from lavatar.training.checkpoint import Checkpoint
from lavatar.training.files import file_digest, write_json

sys.path.insert(0, str(Path(__file__).parent))
from dataset_files import make_dataset
from platform_fakes import FakeHandle, FakeRunner, finish


def solid(handle: FakeHandle) -> StageResult:
    """A stage that leaves what the real one leaves, in small."""
    spec = handle.spec
    if spec.kind is StageKind.PREPROCESS:
        make_dataset(spec.out_dir)
        return StageResult({"manifest": spec.out_dir / "manifest.json"})
    if spec.kind is StageKind.PREVIEW:
        return finish(handle)
    for step in (5, 10):
        checkpoints.save(spec.out_dir / "phase", make_checkpoint(step))
    write_model(spec.out_dir / "release")
    return StageResult({"release": spec.out_dir / "release"}, {"loss": 0.5})


def make_checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"w": torch.full((3,), float(step))}, {"step/w": torch.tensor(step)})


def write_model(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"w": torch.ones(8)}, folder / "model.safetensors")
    weights = {"file": "model.safetensors", "sha256": file_digest(folder / "model.safetensors")}
    write_json(folder / "config.json", {"weights": weights})


def solid_runner() -> FakeRunner:
    return FakeRunner({kind.value: solid for kind in StageKind})


def doctor(home: Home, *, repair: bool = False) -> list[Outcome]:
    """What `lavatar doctor` finds in the home."""
    return list(inspect(home, NullSink(), repair=repair))


def words(found: list[Outcome]) -> list[str]:
    return [outcome.finding.what for outcome in found]


def flip_byte(path: Path) -> None:
    """One byte in the middle of a file, really."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))
