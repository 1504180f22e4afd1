"""Sec. 5.1 (input): the first pass over a video. Faces found in segments, and which frames can be used.

Frames without exactly one clear face are dropped, counted and named with the reason; too many of them are an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lavatar.configs.preprocess import PreprocessConfig
from lavatar.contracts import Event, EventSink, ParallelMap
from lavatar.datasets import video
from lavatar.datasets.tracking import Track, open_tracker
from lavatar.errors import FaceError, VideoError

NO_FACE = "no face"
TWO_FACES = "several faces of comparable size"
BAD_FIT = "landmarks do not fit a rigid head"
_MANY_FACES = 0.02  # share of frames with several faces that still counts as isolated (and at least five frames)


@dataclass(frozen=True)
class Segment:
    """Frames start … stop-1; `warmup` frames before it are seen but not kept."""

    number: int
    start: int
    stop: int
    warmup: int


@dataclass(frozen=True)
class TrackJob:
    """What a worker needs to track one segment."""

    path: Path
    index: video.FrameIndex
    segment: Segment
    tracker: str


@dataclass(frozen=True)
class TrackedVideo:
    """The first pass's result: a track for each usable frame, and the dropped ones with reasons."""

    path: Path
    index: video.FrameIndex
    width: int
    height: int
    frames: tuple[int, ...]
    tracks: tuple[Track, ...]
    dropped: tuple[tuple[int, str], ...]


def segments(frames: int, config: PreprocessConfig) -> list[Segment]:
    """Cut by configuration alone: how many workers there are must not show in the result."""
    size = config.segment_frames
    return [
        Segment(number, start, min(start + size, frames), min(start, config.warmup_frames))
        for number, start in enumerate(range(0, frames, size))
    ]


def track_segment(job: TrackJob) -> list[Track | None]:
    """One segment in a worker: a track or None for each of its frames."""
    cut = job.segment
    tracker = open_tracker(job.tracker)
    tracks: list[Track | None] = []
    try:
        for i, seconds, rgb in video.read_frames(job.path, cut.start - cut.warmup, cut.stop, job.index):
            track = tracker.track(rgb, seconds)
            if i >= cut.start:
                tracks.append(track)
    finally:
        tracker.close()
    return tracks


def track_video(
    path: Path, config: PreprocessConfig, *, parallel: ParallelMap, events: EventSink, stage: str
) -> TrackedVideo:
    """First pass: index, track all segments, drop what cannot be used. DataError if too little remains."""
    path = Path(path)
    info = video.probe(path)
    events.emit(Event(stage, text=f"reading {path.name}"))
    index = video.index_frames(path, config.max_frames)
    if index.frames < config.min_frames:
        raise VideoError(
            f"{path}: {index.frames} frames, at least {config.min_frames} are needed",
            "Give a longer video, or lower preprocess.min_frames.",
        )
    jobs = [TrackJob(path, index, cut, config.tracker) for cut in segments(index.frames, config)]
    found: list[Track | None] = []
    for part in parallel(track_segment, jobs):
        found.extend(part)
        events.emit(Event(stage, text="landmarks", done=len(found), total=index.frames, unit="frames"))
    dropped = judge(path, found, config)
    kept = [i for i in range(len(found)) if i not in dropped]
    return TrackedVideo(
        path, index, info.width, info.height, tuple(kept), tuple(t for i in kept if (t := found[i]) is not None),
        tuple(sorted(dropped.items())),
    )  # fmt: skip


def judge(path: Path, found: Sequence[Track | None], config: PreprocessConfig) -> dict[int, str]:
    """Frames to drop, with the reason. FaceError if there is no face, two people, or the face is lost for too long."""
    dropped = {i: NO_FACE for i, track in enumerate(found) if track is None}
    if len(dropped) == len(found):
        raise FaceError(
            f"{path}: no face was found in any of {len(found)} frames",
            "The face must be seen from the front and be at least a tenth of the picture wide.",
        )
    several = [i for i, track in enumerate(found) if track is not None and track.faces > 1]
    if len(several) > max(5, _MANY_FACES * len(found)):
        raise FaceError(
            f"{path}: {TWO_FACES} in {len(several)} of {len(found)} frames: {ranges(several)}",
            "Crop the video to one person, or cut these frames out.",
        )
    dropped.update(dict.fromkeys(several, TWO_FACES))
    check_dropped(path, dropped, len(found), config)
    return dropped


def drop_misfits(path: Path, errors_px: np.ndarray, size: int) -> np.ndarray:
    """Which frames' landmarks lie so far off the personal shape that the tracker must have been wrong (bool N)."""
    limit = max(12.0 * size / 512.0, 6.0 * float(np.median(errors_px)))
    return np.asarray(errors_px > limit)


def check_dropped(path: Path, dropped: dict[int, str], total: int, config: PreprocessConfig) -> None:
    """FaceError past `max_dropped`, or with fewer than `min_frames` left; the message counts reasons, names frames."""
    left = total - len(dropped)
    if len(dropped) <= config.max_dropped * total and left >= config.min_frames:
        return
    counts = ", ".join(f"{reason}: {count}" for reason, count in Counter(dropped.values()).most_common())
    allowed = f"at most {config.max_dropped:.0%} may be, and at least {config.min_frames} must be left"
    where = ranges(sorted(dropped))
    raise FaceError(
        f"{path}: {len(dropped)} of {total} frames cannot be used ({allowed}); {counts}; frames {where}",
        "Cut out the parts in which the face cannot be seen, or raise preprocess.max_dropped.",
    )


def ranges(frames: Sequence[int], most: int = 8) -> str:
    """3, 4, 5, 9 → "3-5, 9"; the tail is counted when there are many."""
    runs: list[list[int]] = []
    for i in frames:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    shown = ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in runs[:most])
    return shown + (f" and {len(runs) - most} more runs" if len(runs) > most else "")
