"""Frames by exact index from any codec; bad files get a clear error."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from lavatar.datasets import video
from lavatar.datasets.container import NOT_A_VIDEO, require_whole
from lavatar.errors import VideoError
from tests.unit.video_files import counted_frames, number_of, write_video, write_with_sound


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
    with pytest.raises(VideoError, match=r"notes\.mp4: (the file is empty|it is not a video|it is text)") as caught:
        video.probe(path)
    assert "Errno" not in caught.value.message
    assert caught.value.hint == NOT_A_VIDEO


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="no such file"):
        video.probe(tmp_path / "gone.mp4")
    with pytest.raises(VideoError, match="it is a folder"):
        video.probe(tmp_path)


@pytest.fixture(scope="module")
def half_a_minute(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same 30 seconds of noise, so that bytes grow with time: header at the end, at the front, WebM."""
    folder = tmp_path_factory.mktemp("whole")
    noise = np.random.default_rng(0).integers(0, 255, (300, 32, 48, 3), dtype=np.uint8)
    files = {
        "a.mp4": write_video(folder / "a.mp4", noise, fps=10, options={"b": "100k"}),
        "a.webm": write_video(folder / "a.webm", noise, fps=10, codec="libvpx", options={"b": "100k", "cpu-used": "8"}),
        "front.mp4": folder / "front.mp4",
    }
    remux(files["a.mp4"], files["front.mp4"], {"movflags": "+faststart"})
    return files


@pytest.mark.parametrize("share", [0.33, 0.5, 0.97])
@pytest.mark.parametrize("name", ["a.mp4", "front.mp4", "a.webm"])
def test_a_file_that_was_cut_off_is_told_without_decoding_it(
    half_a_minute: dict[str, Path], tmp_path: Path, name: str, share: float
) -> None:
    whole, cut = half_a_minute[name], tmp_path / f"cut_{name}"
    require_whole(whole)
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
    for check in (require_whole, video.index_frames):
        with pytest.raises(VideoError, match="cut_") as caught:
            check(cut)
        assert "truncated or damaged" in caught.value.hint
        assert "Errno" not in caught.value.message
    if name != "a.mp4":
        assert video.probe(cut).width == 48, "its beginning is there"
        assert video.index_frames(cut, 40).frames == 40, "the first frames can be used"


def remux(source: Path, target: Path, options: dict[str, str] | None = None, start: float = 0.0) -> None:
    """The same packets in another file; what is before `start` stays in it and is not shown (an edit list)."""
    import av

    with av.open(str(source)) as old, av.open(str(target), "w", options=options or {}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None and packet.pts is not None:
                offset = int(start / packet.time_base)
                packet.pts, packet.dts = packet.pts - offset, packet.dts - offset
                packet.stream = stream
                new.mux(packet)


def test_a_clip_cut_out_without_encoding_is_whole(half_a_minute: dict[str, Path], tmp_path: Path) -> None:
    """The frames before the cut lie in the file, for those that are shown need them."""
    remux(half_a_minute["a.mp4"], tmp_path / "clip.mp4", start=5.15)
    index = video.index_frames(tmp_path / "clip.mp4")
    assert index.frames < 250 < video.probe(tmp_path / "clip.mp4").frames


def test_a_recording_of_a_browser_has_no_length_and_passes(half_a_minute: dict[str, Path], tmp_path: Path) -> None:
    remux(half_a_minute["a.webm"], tmp_path / "live.webm", {"live": "1"})
    assert video.probe(tmp_path / "live.webm").duration is None
    assert video.index_frames(tmp_path / "live.webm").frames == 300


@pytest.mark.parametrize(("name", "codec"), [("v.mp4", "libx264"), ("v.webm", "libvpx")])
def test_pauses_of_a_variable_frame_rate_are_no_missing_end(tmp_path: Path, name: str, codec: str) -> None:
    times = [0, 40, 80, 2600, 2640, 5200, 5240, 8000]
    path = write_video(tmp_path / name, counted_frames(8), codec=codec, times_ms=times, options={"b": "1M"})
    assert video.index_frames(path).frames == 8
    if name == "v.webm":  # a last picture that stands as long as others did, which only the header says
        assert video.index_frames(lengthened(path, 10.5)).frames == 8


def test_an_even_rate_leaves_no_room_for_a_pause(half_a_minute: dict[str, Path]) -> None:
    with pytest.raises(VideoError, match=r"ends after 30\.0 of 31\.0 s"):
        require_whole(lengthened(half_a_minute["a.webm"], 31.0))


def lengthened(path: Path, claimed: float) -> Path:
    """A copy whose header claims another length (Matroska: milliseconds as a double)."""
    copy, element = path.with_name(f"long_{path.name}"), b"\x44\x89\x88"
    head, _, rest = path.read_bytes().partition(element)
    copy.write_bytes(head + element + struct.pack(">d", 1000 * claimed) + rest[8:])
    assert video.probe(copy).duration == claimed
    return copy


@pytest.mark.parametrize(("name", "codec", "sound"), [("s.mp4", "libx264", "aac"), ("s.webm", "libvpx", "libopus")])
def test_sound_may_outlast_the_pictures(tmp_path: Path, name: str, codec: str, sound: str) -> None:
    path = write_with_sound(tmp_path / name, codec, sound, pictures=25, seconds=4)
    assert video.index_frames(path).frames == 25
    cut = tmp_path / f"cut_{name}"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoError, match="cut_"):
        require_whole(cut)


@pytest.mark.parametrize("name", ["conversation.webm", "glasses.mp4", "grimaces.mp4", "newsreader.mp4"])
def test_real_recordings_are_whole(videos: Path, name: str) -> None:
    assert require_whole(videos / name) > 19


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
