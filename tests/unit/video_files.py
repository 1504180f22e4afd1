"""Small videos written by tests, good and bad ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from lavatar.datasets import video


def write_video(
    path: Path,
    frames: Iterable[np.ndarray],
    *,
    fps: int = 25,
    codec: str = "libx264",
    times_ms: Sequence[int] | None = None,
    rotation: int | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """RGB uint8 frames → a file; `times_ms` makes the rate variable, `rotation` sets the display flag."""
    frames = list(frames)
    height, width = frames[0].shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options or {"crf": "16", "g": "12"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if times_ms is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for i, rgb in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            frame.pts = i if times_ms is None else times_ms[i]
            frame.time_base = Fraction(1, fps) if times_ms is None else Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_with_sound(path: Path, codec: str, sound: str, pictures: int, seconds: int) -> Path:
    """One second of noise in 25 pictures, `seconds` of it to be heard."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        shown = container.add_stream(codec, rate=25, options={"b": "100k"})
        shown.width, shown.height, shown.pix_fmt = 48, 32, "yuv420p"
        heard = container.add_stream(sound, rate=48000, layout="mono")
        for _ in range(pictures):
            rgb = rng.integers(0, 255, (32, 48, 3), dtype=np.uint8)
            container.mux(shown.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(shown.encode())
        for i in range(50 * seconds):
            noise = rng.normal(0, 3000, (1, 960)).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(noise, format="s16", layout="mono")
            frame.sample_rate, frame.pts = 48000, 960 * i
            container.mux(heard.encode(frame))
        container.mux(heard.encode())
    return path


def counted_frames(count: int, width: int = 96, height: int = 64) -> list[np.ndarray]:
    """Frames whose grey level says their number: 4 levels a frame survive a codec."""
    frames = []
    for i in range(count):
        frame = np.full((height, width, 3), 20 + 4 * (i % 50), np.uint8)
        frame[: height // 4, : width // 4] = (250, 10, 10)  # a red corner shows the orientation
        frames.append(frame)
    return frames


def number_of(rgb: np.ndarray) -> int:
    """The number (modulo 50) that `counted_frames` put in."""
    return round((float(rgb[-8:, -8:].mean()) - 20) / 4)


def clip_of(path: Path, count: int, start: int = 0) -> list[np.ndarray]:
    """Some frames of a real video."""
    return [rgb for _, _, rgb in video.read_frames(path, start, start + count)]


def write_drawn_head(path: Path, count: int = 8) -> tuple[Path, np.ndarray]:
    """A drawn head in which a tracker of real faces finds one, as a video and as its frames."""
    from lavatar.datasets import synthetic
    from lavatar.datasets.video import read_frames

    camera, identity = synthetic.default_camera(256), synthetic.Identity.from_seed(2)
    pictures = []
    for i in range(count):
        pose = synthetic.default_pose(3.0 * i - 10, 4.0 * np.cos(i), 0.0)
        rgb, _, _ = synthetic.render(identity, synthetic.Expression(jaw=i / count), pose, camera)
        pictures.append((rgb * 255).round().astype(np.uint8))
    write_video(path, pictures)
    return path, np.stack([rgb for _, _, rgb in read_frames(path)])
