"""Types that every room shares. No torch, no ray, no mlflow here: importing this must stay cheap.

Data flows down as arguments; results flow back up through the small protocols at the end of this file.
Shapes, axes and units are fixed in docs/CONVENTIONS.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")

EXPRESSIONS = ("jaw", "blink", "smile", "pucker", "brows", "gaze")
"""Expression measures reported everywhere, in this order; each is a scalar a frame (docs/CONVENTIONS.md)."""

COEFFICIENTS = 51
"""Expression coefficients a frame: MediaPipe's 52 less the neutral one, which says nothing."""

MOST_SIDE = 4096
"""Pixels of a side of a portrait; more is no picture of a face but an attempt to fill the memory."""

MOST_RATE = 480.0
"""Frames a second of a video: no face needs more."""

TIMING, SYSTEM = "timing/", "system/"
"""Parts of the names of curves of speed, and of what the machine does."""


def measures_time(name: str) -> bool:
    """Whether a curve or figure says how fast something went, or on what machine: no two runs have it alike."""
    parts = re.split(r"[/.]", name)
    return bool({TIMING[:-1], SYSTEM[:-1]} & set(parts[:-1])) or parts[-1] in ("seconds", "first_step")


class Split(StrEnum):
    """Which side of the split in time a frame belongs to (Sec. 5.1: 10 % held out)."""

    TRAIN = "train"
    EVAL = "eval"


class StageKind(StrEnum):
    """The kinds of stage a submit is made of: of each pair its own `pair`, or one `shared` of all of them."""

    PREPROCESS = "preprocess"
    AVATAR = "avatar"
    PAIR = "pair"
    SHARED = "shared"
    PREVIEW = "preview"


@dataclass(frozen=True)
class HeadPose:
    """Head-to-camera similarity: x_cam = scale * rotation @ x_head + translation (OpenCV camera, metres)."""

    rotation: tuple[tuple[float, ...], ...]  # 3×3
    translation: tuple[float, float, float]
    scale: float


@dataclass(frozen=True)
class Camera:
    """Pinhole camera of the square portrait crop; pixels, centre at (cx, cy)."""

    focal: float
    cx: float
    cy: float
    size: int


@dataclass(frozen=True)
class FrameMeta:
    """KEY.meta.json of one sample. Points are in pixels of the portrait crop; transforms are 2×3 affine."""

    frame: int  # index in the source video
    time: float  # seconds
    split: str
    landmarks: tuple[tuple[float, float], ...]  # 68 × (x, y)
    pose: HeadPose
    camera: Camera
    portrait_transform: tuple[tuple[float, ...], ...]  # source pixels → portrait pixels
    face_transform: tuple[tuple[float, ...], ...]  # portrait pixels → face-crop pixels
    score: float
    expression: Mapping[str, float] = field(default_factory=dict)
    irises: tuple[tuple[float, float], ...] = ()  # middles of both, image left first; none if the tracker sees none

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> FrameMeta:
        """The reverse. Raises ValueError, TypeError, KeyError, OverflowError for what is no such data: a wrong shape,
        a number that is none (an expression's may be not-a-number: not measured)."""
        pose, camera = data["pose"], data["camera"]
        (x, y, z), (scale,) = _numbers(pose["translation"], 3), _numbers([pose["scale"]], 1)
        if not (isinstance(data["frame"], int) and data["frame"] >= 0):
            raise ValueError(f"the frame's number is {data['frame']!r:.40}")
        return FrameMeta(
            **{
                **data,
                "time": float(data["time"]),
                "split": Split(data["split"]).value,
                "landmarks": _points(data["landmarks"], 68),
                "irises": _points(data["irises"], 2) if data["irises"] else (),
                "pose": HeadPose(_rows(pose["rotation"], 3, 3), (x, y, z), scale),
                "camera": _camera(**camera),
                "portrait_transform": _rows(data["portrait_transform"], 2, 3),
                "face_transform": _rows(data["face_transform"], 2, 3),
                "score": float(data["score"]),
                "expression": {str(name): float(value) for name, value in data["expression"].items()},
            }
        )


def _numbers(values: Sequence[Any], count: int) -> tuple[float, ...]:
    """So many finite numbers."""
    found = tuple(float(value) for value in values)
    if len(found) != count or not all(map(math.isfinite, found)):
        raise ValueError(f"{count} finite numbers are wanted, got {str(found)[:80]}")
    return found


def _rows(values: Sequence[Any], height: int, width: int) -> tuple[tuple[float, ...], ...]:
    if len(values) != height:
        raise ValueError(f"{height} rows are wanted, got {len(values)}")
    return tuple(_numbers(row, width) for row in values)


def _points(values: Sequence[Any], count: int) -> tuple[tuple[float, float], ...]:
    return tuple((x, y) for x, y in _rows(values, count, 2))


def _camera(focal: Any, cx: Any, cy: Any, size: Any) -> Camera:
    focal, cx, cy = _numbers((focal, cx, cy), 3)
    if focal <= 0 or not isinstance(size, int) or not 0 < size <= MOST_SIDE:
        raise ValueError(f"a camera of focal length {focal:g} and side {size!r:.40}")
    return Camera(focal, cx, cy, size)


@dataclass(frozen=True)
class VideoSource:
    """Where a subject's frames come from: a video file, or the seed of a synthetic subject."""

    name: str
    path: Path | None = None
    synthetic_seed: int | None = None
    digest: str = ""  # SHA-256 of the file, by which a node without it finds it in the store


@dataclass(frozen=True)
class StageSpec:
    """One unit of work, complete: a worker needs nothing else to run it.

    `key` is the digest of everything the result depends on. `inputs` are folders of upstream results by role
    (`dataset`, `avatar_dataset`, `actor_dataset`, `avatar`, `pair`; `warm`: the pair that another one begins at); a
    shared stage has several of a role, as ROLE/LABEL. `recipe` is `Recipe.model_dump(mode="json")`.
    """

    kind: StageKind
    name: str  # for people: "avatar:conversation"
    key: str
    home: Path
    out_dir: Path
    inputs: Mapping[str, Path]
    recipe: Mapping[str, Any]
    sources: Mapping[str, VideoSource] = field(default_factory=dict)


@dataclass(frozen=True)
class StageResult:
    """What a stage leaves: files by name (absolute paths), figures (nested numbers; None where weights are missing)."""

    artefacts: Mapping[str, Path]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Event:
    """Something worth showing while a stage runs. Progress has done/total; a message has text."""

    stage: str
    text: str = ""
    done: int | None = None
    total: int | None = None
    unit: str = ""
    level: str = "info"


class EventSink(Protocol):
    """Where a stage says how far it is. Cheap; raises nothing but Interrupted, after a cancel."""

    def emit(self, event: Event) -> None: ...


class MetricSink(Protocol):
    """Where training logs curves and pictures. Steps already logged by an earlier attempt are ignored."""

    def log_params(self, params: Mapping[str, Any]) -> None: ...

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log_picture(self, step: int, name: str, image_hwc: Any) -> None:
        """`image_hwc`: uint8 RGB array."""
        ...

    def log_file(self, path: Path, folder: str = "") -> None: ...

    def flush(self) -> None:
        """Send what waits: called before a checkpoint, for a restart logs only what comes after it."""
        ...

    def close(self) -> None:
        """Flush. The run itself is ended by whoever opened the stage."""
        ...


class MetricSinkFactory(Protocol):
    """Picklable; called in the process that logs (a Ray worker), never shipped open. `node`: what its machine is called
    in a run that is worked on by several at once."""

    def __call__(self, node: str = "") -> MetricSink:
        """For the process that logs the work. It says what its machine does, too."""
        ...

    def beside(self, node: str) -> MetricSink:
        """For a process of another machine that works on the same run: it says what that one does. Nothing else is
        logged through it."""
        ...


class ParallelMap(Protocol):
    """map() over independent work, results in the order of the items, whatever runs them."""

    def __call__(self, function: Callable[[T], R], items: Sequence[T]) -> Iterable[R]: ...


class NullSink:
    """Swallows events and metrics: for library use and tests that look elsewhere."""

    def emit(self, event: Event) -> None: ...

    def log_params(self, params: Mapping[str, Any]) -> None: ...

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log_picture(self, step: int, name: str, image_hwc: Any) -> None: ...

    def log_file(self, path: Path, folder: str = "") -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...
