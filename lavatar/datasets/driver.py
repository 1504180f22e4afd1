"""Fig. 4 (input): the actor's faces and head poses, without matting: of a video, or of pictures in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from lavatar.configs.preprocess import PreprocessConfig
from lavatar.contracts import Camera, EventSink, HeadPose, NullSink, ParallelMap
from lavatar.datasets import crops, tracks, video
from lavatar.datasets.preprocess import serial
from lavatar.datasets.solve import Solved, solve
from lavatar.datasets.tracking import open_tracker
from lavatar.datasets.tracks import TrackedVideo

PICTURES = Path("the pictures")
"""What errors call frames that came from no file."""
PICTURES_FPS = 25
"""The rate that pictures without times are taken to have: the tracker follows a face in time."""


@dataclass(frozen=True)
class DriverClip:
    """A driving video without matting: what `reenact` feeds to the shared encoder. N usable frames."""

    faces_NHW3: np.ndarray  # uint8
    poses: list[HeadPose]
    times: np.ndarray  # seconds from the first frame of the video
    indices: np.ndarray  # frame numbers in the video
    expressions: dict[str, np.ndarray]
    dropped: list[dict[str, Any]]
    camera: Camera
    portrait_transform: np.ndarray  # source → portrait pixels, 2×3
    fps: float


def track_driver(
    path: Path,
    config: PreprocessConfig,
    *,
    parallel: ParallelMap = serial,
    events: EventSink | None = None,
    stage: str = "driver",
) -> DriverClip:
    """Faces and head poses of a driving video. Raises as `preprocess` does."""
    found = tracks.track_video(Path(path), config, parallel=parallel, events=events or NullSink(), stage=stage)
    solved = solve(found, config)
    numbers = [job.meta.frame for job in solved.jobs]
    frames = video.read_frames(found.path, min(numbers), max(numbers) + 1, found.index)
    return _clip(found, solved, ((i, rgb) for i, _, rgb in frames), config)


def track_pictures(frames_NHW3: np.ndarray, config: PreprocessConfig) -> DriverClip:
    """The same of pictures, uint8 RGB, one after the other; of a single one too. Raises FaceError, WeightsError."""
    count, height, width = frames_NHW3.shape[:3]
    index = video.FrameIndex(tuple(range(count)), (0,), Fraction(1, PICTURES_FPS), exact=True)
    tracker = open_tracker(config.tracker)
    try:
        seen = [tracker.track(rgb, index.time(i)) for i, rgb in enumerate(frames_NHW3)]
    finally:
        tracker.close()
    config = config.model_copy(update={"min_frames": 1})
    dropped = tracks.judge(PICTURES, seen, config)
    kept = [(i, track) for i, track in enumerate(seen) if track is not None and i not in dropped]
    numbers, usable = (tuple(each) for each in zip(*kept, strict=True))
    found = TrackedVideo(PICTURES, index, width, height, numbers, usable, tuple(sorted(dropped.items())))
    return _clip(found, solve(found, config), enumerate(frames_NHW3), config)


def _clip(
    found: TrackedVideo, solved: Solved, frames: Iterable[tuple[int, np.ndarray]], config: PreprocessConfig
) -> DriverClip:
    """The faces out of the frames, with what was solved of them."""
    wanted = {job.meta.frame: job for job in solved.jobs}
    faces = np.zeros((len(wanted), config.face_size, config.face_size, 3), np.uint8)
    place = 0
    for i, rgb in frames:
        if i in wanted:
            job = wanted[i]
            faces[place] = crops.face_crop(rgb, np.asarray(job.source_to_face), config, job.source_landmarks)
            place += 1
    metas = [job.meta for job in solved.jobs]
    names = metas[0].expression
    return DriverClip(
        faces_NHW3=faces,
        poses=[m.pose for m in metas],
        times=np.array([m.time for m in metas]),
        indices=np.array([m.frame for m in metas]),
        expressions={name: np.array([m.expression[name] for m in metas]) for name in names},
        dropped=[{"frame": i, "reason": reason} for i, reason in solved.dropped],
        camera=solved.camera,
        portrait_transform=solved.portrait_transform,
        fps=found.index.fps,
    )
