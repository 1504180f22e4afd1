"""Types that every room shares. No torch, no ray, no mlflow here: importing this must stay cheap.

Data flows down as arguments; results flow back up through the small protocols at the end of this file.
Shapes, axes and units are fixed in docs/CONVENTIONS.md.
"""

from __future__ import annotations

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
        pose, camera = data["pose"], data["camera"]
        return FrameMeta(
            **{
                **data,
                "landmarks": tuple((x, y) for x, y in data["landmarks"]),
                "irises": tuple((x, y) for x, y in data["irises"]),
                "pose": HeadPose(tuple(tuple(r) for r in pose["rotation"]), tuple(pose["translation"]), pose["scale"]),
                "camera": Camera(**camera),
                "portrait_transform": tuple(tuple(r) for r in data["portrait_transform"]),
                "face_transform": tuple(tuple(r) for r in data["face_transform"]),
            }
        )


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


MetricSinkFactory = Callable[[], MetricSink]
"""Picklable; called in the process that logs (a Ray worker), never shipped open."""


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
