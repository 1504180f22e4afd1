"""Portraits to an mp4 that browsers play: H.264 yuv420p, constant frame rate, index in front, sound as AAC.

Frames are streamed: one picture at a time is in memory. The file appears under its name only when it is complete.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from lavatar.errors import StorageError, VideoError
from lavatar.inference.audio import AudioSpan, audio_format, has_audio, read_span, sound_frame

BT709 = 1  # the code H.264 uses for primaries, transfer and matrix alike
LIMITED_RANGE = 1


@dataclass(frozen=True)
class EncodedVideo:
    """What was written. `duration` in seconds, `frames` at the constant rate `fps`."""

    path: Path
    frames: int
    fps: float
    width: int
    height: int
    has_audio: bool

    @property
    def duration(self) -> float:
        return self.frames / self.fps


def constant_rate(
    frames: Iterable[tuple[float, np.ndarray]], fps: float, hold: float | None = None
) -> Iterator[np.ndarray]:
    """Timed pictures on the regular clock start + k/fps: the latest picture stands until the next one is due.

    Keeps sound and picture together where frames were dropped (the last one is held) or come at a variable rate.
    `hold`: seconds after which a gap is cut short instead (None: never); then the sound no longer fits.
    """
    start: float | None = None
    shown = 0
    last: np.ndarray | None = None
    for time, picture in frames:
        start = time if start is None else start
        due = round((time - start) * fps)
        if hold is not None and due - shown > hold * fps:
            start += (due - shown) / fps - hold
            due = round((time - start) * fps)
        if last is not None:
            for _ in range(due - shown):
                yield last
            shown = max(shown, due)
        last = picture
    if last is not None:
        yield last


def write_video(
    path: Path, frames: Iterable[np.ndarray], fps: float, audio: AudioSpan | None = None, crf: int = 18
) -> EncodedVideo:
    """Encode uint8 RGB pictures (H, W, 3; H and W even) to `path`.

    `audio.duration` is an upper bound: sound longer than the pictures is cut at the last one. A source without a
    sound stream gives a silent file. Raises VideoError without pictures, StorageError when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    if audio is not None and not has_audio(audio.path):
        audio = None
    try:
        result = _write(part, path, frames, fps, audio, crf)
        os.replace(part, path)
    except OSError as error:  # av's errors are OSErrors with errno where they come from the system
        raise storage_error(path, error) from None
    finally:
        part.unlink(missing_ok=True)
    return result


def storage_error(path: Path, error: OSError) -> Exception:
    """A StorageError that names `path` where the disk or the permissions are to blame, else `error` itself."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return error
    return StorageError(f"{path} cannot be written: {error.strerror}", "Free some space or choose another folder.")


def _write(
    part: Path, path: Path, frames: Iterable[np.ndarray], fps: float, audio: AudioSpan | None, crf: int
) -> EncodedVideo:
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise VideoError(f"there is no picture to write to {path}", "Check that the driving video shows a face.")
    height, width = first.shape[:2]
    if height % 2 or width % 2:
        raise VideoError(f"pictures of {width}×{height} cannot be H.264 yuv420p", "Use an even width and height.")
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(part), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        video = _video_stream(container, rate, width, height, crf)
        sound = _AudioTrack(container, audio) if audio is not None else None
        count = 0
        for picture in itertools.chain([first], iterator):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            frame.pts, frame.time_base = count, 1 / rate
            container.mux(video.encode(frame))
            count += 1
            if sound is not None:
                sound.advance(float(count / rate))
        container.mux(video.encode(None))
        if sound is not None:
            sound.finish()
    return EncodedVideo(path, count, float(rate), width, height, sound is not None)


def _video_stream(
    container: av.container.OutputContainer, rate: Fraction, width: int, height: int, crf: int
) -> av.VideoStream:
    stream = container.add_stream("libx264", rate=rate)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.time_base = 1 / rate
    context = stream.codec_context
    context.options = {"crf": str(crf), "preset": "veryfast"}
    # named in the file: players guess the matrix from the size otherwise, and faces come out reddish
    context.color_primaries = context.color_trc = context.colorspace = BT709
    context.color_range = LIMITED_RANGE
    return stream


class _AudioTrack:
    """The sound of the file, encoded just ahead of the pictures so that neither waits long for the other."""

    def __init__(self, container: av.container.OutputContainer, span: AudioSpan) -> None:
        self.container = container
        self.form = audio_format(span.path)
        self.stream = container.add_stream("aac", rate=self.form.rate)
        self.stream.codec_context.layout = self.form.layout
        self.stream.codec_context.bit_rate = 128_000
        self.frames = read_span(span, self.form)
        self.held: av.AudioFrame | None = None
        self.encoded = 0  # samples
        self.limit = 0  # samples the pictures reach to

    def advance(self, until: float) -> None:
        """Encode the sound up to `until` seconds of the clip; what reaches beyond is kept back."""
        self.limit = round(until * self.form.rate)
        while True:
            frame = self.held if self.held is not None else next(self.frames, None)
            self.held = None
            if frame is None:
                return
            if self.encoded + frame.samples > self.limit:
                self.held = frame
                return
            self.container.mux(self.stream.encode(frame))
            self.encoded += frame.samples

    def finish(self) -> None:
        """The last, shorter piece: sound ends with the last picture."""
        rest = self.limit - self.encoded
        if self.held is not None and rest > 0:
            data = np.asarray(self.held.to_ndarray(), np.float32)[:, :rest]
            self.container.mux(self.stream.encode(sound_frame(data, self.encoded, self.form)))
        self.container.mux(self.stream.encode(None))
