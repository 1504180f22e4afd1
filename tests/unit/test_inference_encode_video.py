"""mp4 files, decoded again: format, time, sound, and what happens when they cannot be written."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from lavatar.errors import StorageError, VideoError
from lavatar.inference.audio import AudioSpan, audio_format, read_span
from lavatar.inference.encode_video import constant_rate, write_video

RATE = 48_000
CLICK_EVERY = 0.5
VIDEO_LATE = 0.4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 s of sound with a click every half second; the picture's first frame comes 0.4 s after the sound's start."""
    path = tmp_path_factory.mktemp("sound") / "source.mkv"
    sound = np.zeros((1, 4 * RATE), np.float32)
    for k in range(1, 8):
        at = round(k * CLICK_EVERY * RATE)
        sound[0, at : at + 240] = 0.8 * np.sin(np.arange(240) * 0.6)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=RATE)
        audio.codec_context.layout = "mono"
        for i in range(90):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = i + round(VIDEO_LATE * 25), Fraction(1, 25)
            container.mux(video.encode(frame))
        for start in range(0, sound.shape[1], 1024):
            data = (sound[:, start : start + 1024] * 32767).astype(np.int16)
            piece = av.AudioFrame.from_ndarray(data, format="s16", layout="mono")
            piece.sample_rate, piece.pts, piece.time_base = RATE, start, Fraction(1, RATE)
            container.mux(audio.encode(piece))
        for stream in (video, audio):
            container.mux(stream.encode(None))
    return path


def pictures(count: int, height: int = 64, width: int = 128) -> Iterator[np.ndarray]:
    for i in range(count):
        picture = np.full((height, width, 3), (200, 120, 90), np.uint8)
        picture[:, : 8 + i % 32] = 240
        yield picture


def read_sound(path: Path) -> tuple[np.ndarray, int]:
    with av.open(str(path)) as container:
        parts = [f.to_ndarray()[:1] for f in container.decode(audio=0)]
        return np.concatenate(parts, axis=1)[0], container.streams.audio[0].codec_context.sample_rate


def clicks(sound: np.ndarray, rate: int) -> list[float]:
    """Where clicks begin, in seconds."""
    loud = np.flatnonzero(np.abs(sound) > 0.3)
    starts = loud[np.concatenate([[True], np.diff(loud) > rate // 10])]
    return [s / rate for s in starts]


def test_browsers_play_it(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "new" / "clip.mp4"
    written = write_video(out, pictures(50), 25, AudioSpan(source, 0.0, 2.0))
    assert (written.frames, written.duration, written.has_audio) == (50, 2.0, True)
    with av.open(str(out)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, video.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (audio.codec_context.name, audio.codec_context.sample_rate) == ("aac", RATE)
        assert video.average_rate == 25
        assert video.frames == 50
        assert float(video.duration * video.time_base) == pytest.approx(2.0, abs=1e-6)
        assert float(audio.duration * audio.time_base) == pytest.approx(2.0, abs=1e-3)
        frames = list(container.decode(video=0))
    assert len(frames) == 50
    assert np.abs(frames[3].to_ndarray(format="rgb24")[32, 100].astype(int) - (200, 120, 90)).max() <= 3
    content = out.read_bytes()
    assert 0 < content.find(b"moov") < content.find(b"mdat")
    assert [p.name for p in out.parent.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("start", [0.0, 0.75, 1.64])
def test_sound_is_that_of_the_span(tmp_path: Path, source: Path, start: float) -> None:
    """Times count from the first picture, which is late; clicks come where the source has them, within 3 ms."""
    out = tmp_path / "clip.mp4"
    write_video(out, pictures(30), 25, AudioSpan(source, start, 1.2))
    sound, rate = read_sound(out)
    begin = start + VIDEO_LATE
    wanted = [t for t in (k * CLICK_EVERY - begin for k in range(1, 8)) if 0 <= t < 1.19]
    got = clicks(sound, rate)
    assert len(got) == len(wanted)
    assert np.allclose(got, wanted, atol=0.003)


def test_sound_ends_with_the_pictures_and_silence_fills_up(tmp_path: Path, source: Path) -> None:
    short = tmp_path / "short.mp4"
    write_video(short, pictures(25), 25, AudioSpan(source, 0.0, 3.0))  # promised longer than the pictures are
    long = tmp_path / "long.mp4"
    write_video(long, pictures(50), 25, AudioSpan(source, 2.6, 2.0))  # the source ends after 1.0 s of this span
    for path, seconds in ((short, 1.0), (long, 2.0)):
        with av.open(str(path)) as container:
            audio = container.streams.audio[0]
            assert float(audio.duration * audio.time_base) == pytest.approx(seconds, abs=1e-3)


def test_span_has_exactly_its_samples(source: Path) -> None:
    form = audio_format(source)
    frames = list(read_span(AudioSpan(source, 0.333, 0.777), form))
    assert sum(f.samples for f in frames) == round(0.777 * form.rate)
    assert [f.pts for f in frames] == list(range(0, 1024 * len(frames), 1024))


def test_a_silent_source_gives_a_silent_video(tmp_path: Path) -> None:
    silent = tmp_path / "silent.mp4"
    assert not write_video(silent, pictures(5), 25).has_audio
    written = write_video(tmp_path / "out.mp4", pictures(5), 29.97, AudioSpan(silent, 0.0, 1.0))
    assert not written.has_audio
    assert written.fps == pytest.approx(30000 / 1001, rel=1e-5)


def test_pictures_are_not_collected(tmp_path: Path) -> None:
    """Never more than a few pictures alive, however long the video."""
    alive: list[int] = []
    references: list[weakref.ref[np.ndarray]] = []

    def watched() -> Iterator[np.ndarray]:
        for picture in pictures(120):
            references.append(weakref.ref(picture))
            gc.collect(0)
            alive.append(sum(r() is not None for r in references))
            yield picture

    write_video(tmp_path / "clip.mp4", watched(), 25)
    assert max(alive) <= 4


def test_dropped_frames_are_held() -> None:
    timed = [(t, np.full(1, round(t * 10))) for t in (1.0, 1.1, 1.5, 1.6)]  # 1.2 to 1.4 are missing
    assert [int(p[0]) for p in constant_rate(timed, 10)] == [10, 11, 11, 11, 11, 15, 16]


def test_variable_rate_keeps_time() -> None:
    times = np.cumsum(np.random.default_rng(0).uniform(0.01, 0.09, 200))
    shown = [float(p[0]) for p in constant_rate(((t, np.full(1, t)) for t in times), 25)]
    clock = times[0] + np.arange(len(shown)) / 25
    assert np.abs(np.array(shown) - clock).max() < 0.04 + 0.09
    assert len(shown) == round((times[-1] - times[0]) * 25) + 1


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="no picture"):
        write_video(tmp_path / "empty.mp4", iter([]), 25)
    with pytest.raises(VideoError, match="63"):
        write_video(tmp_path / "odd.mp4", pictures(3, height=63), 25)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    out = tmp_path / "clip.mp4"
    out.write_bytes(b"old")
    (tmp_path / f".clip.mp4.{os.getpid()}.part").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left"):
        write_video(out, pictures(50, 512, 512), 25)
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    assert out.read_bytes() == b"old"


def test_a_failing_renderer_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[np.ndarray]:
        yield from pictures(3)
        raise RuntimeError("renderer")

    with pytest.raises(RuntimeError, match="renderer"):
        write_video(tmp_path / "clip.mp4", broken(), 25)
    assert list(tmp_path.iterdir()) == []
