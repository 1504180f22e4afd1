"""Sec. 5.1 (input): frames of a video by exact index, whatever the codec, rotation flag or frame rate.

A frame's index is its place in presentation order, counted by decoding. `index_frames` decodes once and remembers the
time stamps and key frames, so that `read_frames` can later enter in the middle and still return exactly the same.
Frames are RGB uint8, HWC, rotated as the file says they should be shown.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from lavatar.datasets.container import (
    DAMAGED,
    END_TOLERANCE,
    MOST_FRAMES,
    duration,
    open_video,
    reason,
    require_sane,
    require_whole,
    video_stream,
)
from lavatar.errors import VideoError


@dataclass(frozen=True)
class VideoInfo:
    """What the file says about itself; `width` and `height` as shown, after rotation (degrees, counter-clockwise)."""

    width: int
    height: int
    fps: float
    frames: int | None
    duration: float | None
    rotation: int
    has_audio: bool
    codec: str


@dataclass(frozen=True)
class FrameIndex:
    """Every frame's time stamp in presentation order. `exact` says that stamps identify frames, so seeking is safe."""

    stamps: tuple[int, ...]
    keys: tuple[int, ...]  # indices of key frames
    time_base: Fraction
    exact: bool

    @property
    def frames(self) -> int:
        return len(self.stamps)

    def time(self, index: int) -> float:
        """Seconds from the first frame."""
        return float((self.stamps[index] - self.stamps[0]) * self.time_base)

    @property
    def fps(self) -> float:
        """Mean rate; a variable frame rate has no other."""
        last = self.time(len(self.stamps) - 1) if self.stamps else 0.0
        return (len(self.stamps) - 1) / last if last > 0 else 0.0


def probe(path: Path) -> VideoInfo:
    """Open `path`, decode one frame, and say what it is. VideoError if it is no video, or none of it decodes."""
    with open_video(path) as container:
        stream = video_stream(container, path)
        try:
            frame = next(container.decode(stream), None)
        except av.FFmpegError as error:
            raise VideoError(f"{path}: the first frame cannot be decoded ({reason(error)})", DAMAGED) from error
        if frame is None:
            raise VideoError(f"{path}: there is no frame in it", DAMAGED)
        rotation = int(frame.rotation) % 360
        width, height = frame.width, frame.height
        if rotation in (90, 270):
            width, height = height, width
        return VideoInfo(
            width=width,
            height=height,
            fps=float(stream.average_rate or stream.guessed_rate or 0),
            frames=stream.frames or None,
            duration=duration(container, stream),
            rotation=rotation,
            has_audio=bool(container.streams.audio),
            codec=stream.codec_context.name,
        )


def index_frames(path: Path, max_frames: int = 0) -> FrameIndex:
    """Decode all frames (or the first `max_frames`) and remember their time stamps.

    Raises VideoError when decoding breaks off or ends before the file's header says.
    """
    stamps: list[int] = []
    keys: list[int] = []
    with open_video(path) as container:
        stream = video_stream(container, path)
        time_base = Fraction(stream.time_base or Fraction(1, 1000))
        complete = True
        exact = True
        for frame in _decode(container, stream, path, len(stamps)):
            exact = exact and frame.pts is not None
            stamps.append(frame.pts if frame.pts is not None else len(stamps))
            if frame.key_frame:
                keys.append(len(stamps) - 1)
            if len(stamps) >= (max_frames or MOST_FRAMES + 1):
                complete = False
                break
        if complete:
            _check_complete(path, stamps, time_base if exact else None)
    if not exact:  # no time stamps at all: count at the rate that the header names
        rate = stream.average_rate or Fraction(25)
        stamps, time_base = list(range(len(stamps))), Fraction(1) / Fraction(rate)
    increasing = all(a < b for a, b in itertools.pairwise(stamps))
    index = FrameIndex(tuple(stamps), tuple(keys), time_base, exact and increasing)
    require_sane(path, index.frames, index.time(index.frames - 1) if stamps else 0.0)
    return index


def read_frames(
    path: Path, start: int = 0, stop: int | None = None, index: FrameIndex | None = None
) -> Iterator[tuple[int, float, np.ndarray]]:
    """Frames `start` … `stop`-1 as (index, seconds from the first frame, RGB uint8 HWC).

    With an index, decoding begins at the last key frame before `start`; without, at the first frame. Either way the
    numbers are the same.
    """
    if index is not None and start > 0 and index.exact:
        yield from _read_from_key(path, start, stop, index)
        return
    first_time: float | None = None
    with open_video(path) as container:
        stream = video_stream(container, path)
        rate = float(stream.average_rate or 25)
        for i, frame in enumerate(_decode(container, stream, path, 0)):
            if stop is not None and i >= stop:
                return
            seconds = frame.time if frame.time is not None else i / rate
            first_time = seconds if first_time is None else first_time
            if i >= start:
                yield i, index.time(i) if index else seconds - first_time, to_rgb(frame)


def _read_from_key(
    path: Path, start: int, stop: int | None, index: FrameIndex
) -> Iterator[tuple[int, float, np.ndarray]]:
    """Enter at the last key frame at or before `start`; frames are known by their time stamps."""
    number = {stamp: i for i, stamp in enumerate(index.stamps)}
    stop = index.frames if stop is None else min(stop, index.frames)
    if start >= stop:
        return
    key = max((k for k in index.keys if k <= start), default=0)
    with open_video(path) as container:
        stream = video_stream(container, path)
        entered = False
        expected = start
        for frame in _decode(container, stream, path, key) if _seeks(container, stream, index.stamps[key]) else ():
            i = number.get(frame.pts) if frame.pts is not None else None
            # Frames shown before the key frame may lack their references: ignore all until the key itself.
            entered = entered or i == key
            if i is None or not entered or i < start:
                if i is None or i <= start:
                    continue
                break
            if i != expected:
                break
            yield i, index.time(i), to_rgb(frame)
            expected += 1
            if expected >= stop:
                return
    # The container did not seek where it said; count from the first frame instead.
    yield from read_frames_from_start(path, expected, stop, index)


def _seeks(container: av.container.InputContainer, stream: VideoStream, stamp: int) -> bool:
    """Go to that time stamp; False where the container cannot."""
    try:
        container.seek(stamp, stream=stream, backward=True, any_frame=False)
    except (av.FFmpegError, OverflowError):
        return False
    return True


def read_frames_from_start(
    path: Path, start: int, stop: int, index: FrameIndex
) -> Iterator[tuple[int, float, np.ndarray]]:
    """Plain decoding and counting: slow, and the reference for the fast way."""
    with open_video(path) as container:
        stream = video_stream(container, path)
        for i, frame in enumerate(_decode(container, stream, path, 0)):
            if i >= stop:
                return
            if i >= start:
                yield i, index.time(i), to_rgb(frame)


def to_rgb(frame: VideoFrame) -> np.ndarray:
    """RGB uint8 HWC, contiguous (MediaPipe misreads padded rows), turned as the display matrix asks."""
    rgb = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(rgb, turns) if turns else rgb)


def _decode(
    container: av.container.InputContainer, stream: VideoStream, path: Path, first: int
) -> Iterator[VideoFrame]:
    """Frames in presentation order; a decoder's complaint becomes a VideoError that says how far it came."""
    count, size = first, None
    try:
        for frame in container.decode(stream):
            count += 1
            size = size or (frame.width, frame.height)
            if size != (frame.width, frame.height):
                raise VideoError(
                    f"{path}: frame {count} is {frame.width}×{frame.height}, those before are {size[0]}×{size[1]}",
                    "Export it at one size.",
                )
            yield frame
    except av.FFmpegError as error:
        raise VideoError(f"{path}: decoding stopped after frame {count} ({reason(error)})", DAMAGED) from error


def _check_complete(path: Path, stamps: list[int], base: Fraction | None) -> None:
    """All of the file is there, and the decoder made pictures of it to the end (told where there are time stamps)."""
    if not stamps:
        raise VideoError(f"{path}: no frame could be decoded", DAMAGED)
    last = require_whole(path)
    if base is not None and stamps[-1] * base < last - END_TOLERANCE:
        shown = float(stamps[-1] * base)
        raise VideoError(f"{path}: only the first {shown:.1f} of {last:.1f} s could be decoded", DAMAGED)
