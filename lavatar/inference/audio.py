"""The sound of a clip: exactly the samples of its time span, as a gapless stream that starts at the clip's first frame.

Times are seconds from the video's first frame, as `meta.time` of a sample counts them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from lavatar.datasets.container import open_video
from lavatar.errors import VideoError

AAC_RATES = (48_000, 44_100, 32_000, 24_000, 22_050, 16_000)
CHUNK = 1024  # samples a frame: what an AAC encoder takes at a time


@dataclass(frozen=True)
class AudioSpan:
    """`duration` seconds of the sound of `path`, from `start` on."""

    path: Path
    start: float
    duration: float


def has_audio(path: Path) -> bool:
    """Whether `path` is a readable file with a sound stream."""
    try:
        with open_video(path) as container:
            return bool(container.streams.audio)
    except VideoError:
        return False


@dataclass(frozen=True)
class AudioFormat:
    """What the encoder is opened with: rate in Hz and the name of the channel layout."""

    rate: int
    layout: str


def audio_format(path: Path) -> AudioFormat:
    """The source's rate if AAC in a browser takes it (else 48 kHz); mono stays mono, all else becomes stereo."""
    with open_video(path) as container:
        context = container.streams.audio[0].codec_context
        rate = context.sample_rate if context.sample_rate in AAC_RATES else AAC_RATES[0]
        return AudioFormat(rate, "mono" if context.channels == 1 else "stereo")


def read_span(span: AudioSpan, form: AudioFormat) -> Iterator[av.AudioFrame]:
    """Frames of `CHUNK` samples (float planar), pts counted in samples from the span's start, together
    round(duration · rate) samples. What the source lacks (before its sound begins, gaps, after its end) is silence.
    """
    wanted = round(span.duration * form.rate)
    channels = 1 if form.layout == "mono" else 2
    pending = np.zeros((channels, 0), np.float32)
    written = 0
    for piece in _pieces(span, form, wanted, channels):
        pending = np.concatenate([pending, piece], axis=1)
        while pending.shape[1] >= CHUNK:
            yield sound_frame(pending[:, :CHUNK], written, form)
            pending, written = pending[:, CHUNK:], written + CHUNK
    if pending.shape[1]:
        yield sound_frame(pending, written, form)


def _pieces(span: AudioSpan, form: AudioFormat, wanted: int, channels: int) -> Iterator[np.ndarray]:
    """Consecutive float pieces (channels, n) that add up to exactly `wanted` samples, silence where there is none."""
    position = 0
    for first, data in _decoded(span, form):
        if first >= wanted:
            break
        gap = first - position
        if gap > form.rate // 50:  # more than 20 ms missing: a real hole; less is rounding of time stamps
            yield from _silence(channels, min(gap, wanted - position), form.rate)
            position += gap
        elif gap < 0:
            data = data[:, -gap:]  # overlap, or the part before the span begins
        data = data[:, : wanted - position]
        if data.shape[1]:
            yield data
            position += data.shape[1]
    yield from _silence(channels, wanted - position, form.rate)


def _silence(channels: int, count: int, most: int) -> Iterator[np.ndarray]:
    """So many samples, at most `most` at a time: a wrong time stamp may ask for hours."""
    for start in range(0, count, most):
        yield np.zeros((channels, min(most, count - start)), np.float32)


def _decoded(span: AudioSpan, form: AudioFormat) -> Iterator[tuple[int, np.ndarray]]:
    """(position in samples relative to the span's start, float samples) as they come out of the decoder."""
    try:
        with open_video(span.path) as container:
            origin = _first_picture(span.path)
            stream = container.streams.audio[0]
            if span.start > 1:  # a little early: the decoder of a lossy codec needs a run-up
                container.seek(int((origin + span.start - 0.5) / _base(stream)), stream=stream)
            resampler = av.AudioResampler(format="fltp", layout=form.layout, rate=form.rate)
            for frame in container.decode(stream):
                if frame.pts is None:
                    continue
                begin = float(frame.pts * _base(frame)) - origin
                if begin > span.start + span.duration:
                    break
                frame.pts = None  # the position is kept here; the resampler is only asked for samples
                for out in resampler.resample(frame):
                    yield round((begin - span.start) * form.rate), out.to_ndarray()
    except av.FFmpegError as error:
        raise VideoError(
            f"the sound of {span.path} cannot be read: {error}", "Check that the file plays, or remove its sound."
        ) from None


def _first_picture(path: Path) -> float:
    """Time stamp of the first video frame on the file's own clock, in seconds; 0 for a file of sound alone."""
    with open_video(path) as container:
        frame = next(container.decode(video=0), None) if container.streams.video else None
        return float(frame.pts * _base(frame)) if frame is not None and frame.pts is not None else 0.0


def _base(timed: av.AudioFrame | av.VideoFrame | av.AudioStream) -> Fraction:
    return timed.time_base or Fraction(1, 1000)


def sound_frame(data: np.ndarray, position: int, form: AudioFormat) -> av.AudioFrame:
    """Samples (channels, n) as a frame that begins `position` samples into the clip."""
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(data), format="fltp", layout=form.layout)
    frame.sample_rate = form.rate
    frame.pts = position
    frame.time_base = Fraction(1, form.rate)
    return frame
