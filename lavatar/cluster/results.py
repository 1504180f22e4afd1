"""A finished stage on disk: result.json in its folder, renamed into place when all else is there."""

from __future__ import annotations

import json
from pathlib import Path

from lavatar.contracts import StageResult, StageSpec
from lavatar.training.files import file_digest, write_json

NAME = "result.json"
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError)
"""What is raised by JSON from outside that is none, is nested too deeply, or holds something else than was expected."""


def read_result(spec: StageSpec) -> StageResult | None:
    """The result of an earlier run, if all its files are still there."""
    try:
        result = parse_result(spec, (spec.out_dir / NAME).read_bytes())
    except OSError:
        return None
    return result if result is not None and all(whole(path) for path in result.artefacts.values()) else None


def parse_result(spec: StageSpec, text: bytes) -> StageResult | None:
    """The result that a result.json holds; None where it is damaged or another stage's."""
    try:
        data = json.loads(text)
        if data["key"] != spec.key:
            return None
        artefacts = {str(name): spec.out_dir / path for name, path in data["artefacts"].items()}
        metrics, notes = data["metrics"], tuple(str(note) for note in data["notes"])
        if not isinstance(metrics, dict) or not all(_inside(path, spec.out_dir) for path in artefacts.values()):
            return None
        return StageResult(artefacts, metrics, notes)
    except (OSError, *UNREADABLE):
        return None


def _inside(path: Path, folder: Path) -> bool:
    """Whether it lies there, links followed: what a result names is shown and logged."""
    return path.resolve().is_relative_to(folder.resolve())


def whole(path: Path) -> bool:
    """Whether a stage's file or folder is still there, a released model with the weights that its config.json names."""
    config = path / "config.json"
    try:
        if not config.exists():
            return path.exists()
        weights = json.loads(config.read_text()).get("weights", {})
        file = path / weights["file"] if weights else config
        return _inside(file, path) and (not weights or file_digest(file) == weights["sha256"])
    except (OSError, *UNREADABLE):
        return False


def write_result(spec: StageSpec, result: StageResult) -> StageResult:
    """Marks the stage as finished. Paths are kept relative, so that a home can be moved."""
    artefacts = {name: str(Path(path).relative_to(spec.out_dir)) for name, path in result.artefacts.items()}
    data = {
        "key": spec.key,
        "kind": spec.kind.value,
        "name": spec.name,
        "artefacts": artefacts,
        "metrics": result.metrics,
        "notes": list(result.notes),
    }
    write_json(spec.out_dir / NAME, data)
    return result
