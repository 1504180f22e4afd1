"""Frames by exact index from any codec; bad files get a clear error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lavatar.datasets import video
from lavatar.errors import VideoError
from tests.unit.video_files import counted_frames, number_of, write_video


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"g": "10", "bf": "3", "crf": "10"}),
        ("open_gop.mkv", "libx264", {"g": "10", "bf": "3", "crf": "10", "x264-params": "open-gop=1"}),
        ("a.webm", "libvpx", {"g": "10", "b": "2M", "auto-alt-ref": "1", "lag-in-frames": "8"}),
        ("a.avi", "mpeg4", {"g": "10", "b": "4M"}),
    ],
)
def test_entering_anywhere_gives_the_same_frames(
    tmp_path: Path, name: str, codec: str, options: dict[str, str]
) -> None:
    path = write_video(tmp_path / name, counted_frames(47), codec=codec, options=options)
    index = video.index_frames(path)
    assert index.frames == 47
    plain = list(video.read_frames(path))
    assert [number_of(rgb) for _, _, rgb in plain] == list(range(47))
    for start in (1, 9, 10, 11, 23, 46):
        part = list(video.read_frames(path, start, start + 5, index))
        assert [i for i, _, _ in part] == list(range(start, min(start + 5, 47)))
        for i, seconds, rgb in part:
            assert np.array_equal(rgb, plain[i][2]), f"{name}: frame {i} entered at {start}"
            assert seconds == pytest.approx(i / 25, abs=2e-3)


def test_variable_frame_rate_keeps_indices_and_times(tmp_path: Path) -> None:
    times = [0, 40, 120, 130, 400, 440, 1000, 1033, 1066, 1500, 1510, 1900]
    path = write_video(tmp_path / "vfr.mp4", counted_frames(12), times_ms=times, options={"g": "4", "crf": "10"})
    index = video.index_frames(path)
    assert [round(index.time(i) * 1000) for i in range(12)] == times
    part = list(video.read_frames(path, 6, 10, index))
    assert [number_of(rgb) for _, _, rgb in part] == [6, 7, 8, 9]
    assert [round(t * 1000) for _, t, _ in part] == times[6:10]


@pytest.mark.parametrize("degrees", [90, -90, 180])
def test_rotation_flag_is_applied(tmp_path: Path, degrees: int) -> None:
    upright = counted_frames(3)
    stored = [np.rot90(frame, -degrees // 90) for frame in upright]  # as a camera held sideways stores it
    path = write_video(tmp_path / "turned.mp4", stored, rotation=degrees)
    info = video.probe(path)
    assert (info.width, info.height, info.rotation) == (96, 64, degrees % 360)
    _, _, rgb = next(video.read_frames(path))
    assert rgb.shape == (64, 96, 3)
    assert rgb[4, 4, 0] > 200 > 60 > rgb[4, 4, 1]
    assert rgb[-4, -4].max() < 60


def test_rotation_flag_means_what_phones_write(tmp_path: Path) -> None:
    """-90 is a quarter turn clockwise: QuickTime's matrix (0 1; -1 0), as every phone held upright writes it."""
    path = write_video(tmp_path / "phone.mp4", counted_frames(2), rotation=-90)
    assert bytes.fromhex("00000000 00010000 00000000 ffff0000") in path.read_bytes()


def test_probe_says_what_it_is(tmp_path: Path) -> None:
    info = video.probe(write_video(tmp_path / "a.mp4", counted_frames(30)))
    assert (info.width, info.height, info.fps, info.frames, info.has_audio) == (96, 64, 25.0, 30, False)


@pytest.mark.parametrize("content", [b"", b"this is no video\n" * 200, b"\x1b[31mred\n", bytes(range(256)) * 40])
def test_a_file_that_is_no_video_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"notes\.mp4") as caught:
        video.probe(path)
    assert caught.value.hint


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="no such file"):
        video.probe(tmp_path / "gone.mp4")


@pytest.mark.parametrize("name", ["a.mp4", "fast.mp4", "a.webm"])
def test_a_truncated_file_is_an_error(tmp_path: Path, name: str) -> None:
    """Cut in the middle: header at the end (lost), header at the front (frames missing), no frame count (webm)."""
    codec = "libvpx" if name.endswith("webm") else "libx264"
    noise = np.random.default_rng(0).integers(0, 255, (75, 64, 96, 3), dtype=np.uint8)
    whole = write_video(tmp_path / name, noise, codec=codec, options={"b": "1M"})
    if name == "fast.mp4":
        move_header_to_the_front(whole, tmp_path / "front.mp4")
        whole = tmp_path / "front.mp4"
    assert video.index_frames(whole).frames == 75
    cut = tmp_path / f"cut_{name}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(VideoError, match="cut_"):
        video.index_frames(cut)


def move_header_to_the_front(source: Path, target: Path) -> None:
    import av

    with av.open(str(source)) as old, av.open(str(target), "w", options={"movflags": "+faststart"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)


def test_a_sound_file_has_no_picture(tmp_path: Path) -> None:
    import av

    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="no video track"):
        video.probe(path)
