"""Datasets and videos from anywhere: what is read is used or refused by a LavatarError, and nothing is written."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavatar.contracts import FrameMeta
from lavatar.datasets import shards, tarindex, video
from lavatar.datasets.container import open_video, require_whole
from lavatar.datasets.loader import FrameStore
from lavatar.errors import ShardError, VideoError
from lavatar.inference.audio import AudioSpan, audio_format, has_audio, read_span

sys.path.insert(0, str(Path(__file__).parent))
from dataset_files import SIZE, make_dataset, make_meta, make_pictures
from outside import JSON, changed, damaged, only_our_errors
from video_files import counted_frames, write_video, write_with_sound

TAR = "shard-00000.tar"
META = shards.encode_sample(make_meta(0), *make_pictures(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of four frames; each test damages it anew."""
    folder = tmp_path_factory.mktemp("dataset") / "d"
    make_dataset(folder, frames=4, held_out=1)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def restore(folder: Path, whole: dict[str, bytes], **files: bytes) -> None:
    for name, content in {**whole, **files}.items():
        (folder / name).write_bytes(content)


def read_all(folder: Path) -> None:
    """All that reads a dataset, and a look at what lies beside it."""
    before = sorted(folder.parent.rglob("*"))
    for read in (shards.read_manifest, shards.verify, lambda path: list(shards.iterate(path)), load):
        with only_our_errors():
            read(folder)
    assert sorted(folder.parent.rglob("*")) == before


def load(folder: Path) -> None:
    store = FrameStore(folder, 32, "train", threads=1, max_bad=0.5)
    try:
        store.batch(range(len(store)))
    finally:
        store.close()


@given(data=st.data())
def test_a_damaged_tar_is_read_or_refused(folder: Path, whole: dict[str, bytes], data: st.DataObject) -> None:
    restore(folder, whole, **{TAR: data.draw(damaged(whole[TAR]))})
    read_all(folder)


@given(st.binary(max_size=2048))
def test_any_bytes_as_a_tar_are_refused_or_empty(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.tar"
    path.write_bytes(content)
    with only_our_errors():
        assert shards.index_tar(path) == {}


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def member(name: str = "00000000.meta.json", **values: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in values.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (member("../../evil.meta.json"), "no name"), (member("/etc/passwd"), "no name"), (member("a/b.jpg"), "no name"),
        (member("00000000"), "no name"), (member(type=tarfile.SYMTYPE, linkname="/etc/passwd"), "no plain file"),
        (member(type=tarfile.LNKTYPE, linkname="/etc/passwd"), "no plain file"),
        (member(type=tarfile.CHRTYPE), "no plain file"), (member(type=tarfile.FIFOTYPE), "no plain file"),
        (member(type=tarfile.DIRTYPE), "no plain file"), (member(type=tarfile.XHDTYPE), "no plain file"),
        (member(type=tarfile.GNUTYPE_LONGNAME), "no plain file"),
        (member(type=tarfile.GNUTYPE_SPARSE), "no plain file"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.name} {value.type!r}",
)  # fmt: skip
def test_links_devices_and_paths_in_a_tar_are_refused(tmp_path: Path, info: tarfile.TarInfo, reason: str) -> None:
    path = tmp_path / TAR
    path.write_bytes(tar_of((info, b"")))
    with pytest.raises(ShardError, match=reason):
        shards.index_tar(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_length_that_is_not_there_reserves_no_memory(tmp_path: Path) -> None:
    path = tmp_path / TAR
    for size, reason in (
        (2**40, "bytes, at most"),
        (tarindex.MOST_BYTES + 1, "bytes, at most"),
        (2**20, "ends inside"),
    ):
        info = member()
        info.size = size
        path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
        with pytest.raises(ShardError, match=reason):
            shards.index_tar(path)


def test_a_tar_that_is_a_link_is_not_followed(folder: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    restore(folder, whole)
    target = tmp_path / "elsewhere.tar"
    (folder / TAR).rename(target)
    (folder / TAR).symlink_to(target)
    with pytest.raises(ShardError, match="no plain file"):
        list(shards.iterate(folder))
    (folder / TAR).unlink()
    os.mkfifo(folder / TAR)
    with pytest.raises(ShardError, match="no plain file"):
        load(folder)
    (folder / TAR).unlink()
    restore(folder, whole)


@pytest.mark.parametrize("name", ["../x.tar", "/etc/passwd", "a/b.tar", "..", "", "x" * 300 + ".tar", None, 3])
def test_a_manifest_names_no_file_outside_its_folder(folder: Path, whole: dict[str, bytes], name: Any) -> None:
    manifest = json.loads(whole["manifest.json"])
    manifest["tars"][0]["name"] = name
    restore(folder, whole, **{"manifest.json": json.dumps(manifest).encode()})
    with pytest.raises(ShardError, match="a plain one is wanted"):
        shards.read_manifest(folder)
    restore(folder, whole)


@given(data=st.data())
def test_a_changed_manifest_is_read_or_refused(folder: Path, whole: dict[str, bytes], data: st.DataObject) -> None:
    manifest = data.draw(changed(json.loads(whole["manifest.json"])))
    restore(folder, whole, **{"manifest.json": json.dumps(manifest).encode()})
    read_all(folder)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"schema": 2, "frames": ' + b"1" * 10_000 + b"}", b"\xff\xfe"])
def test_json_made_to_break_its_reader_is_refused(folder: Path, whole: dict[str, bytes], content: bytes) -> None:
    restore(folder, whole, **{"manifest.json": content})
    with pytest.raises(ShardError, match="damaged"):
        shards.read_manifest(folder)
    with pytest.raises(ShardError, match="damaged"):
        shards.decode_meta(content)
    restore(folder, whole)


@given(data=st.data())
def test_changed_metadata_is_whole_or_refused(folder: Path, whole: dict[str, bytes], data: st.DataObject) -> None:
    """As somebody writes it who knows the checksums: all that is read has the shapes and numbers that it must have."""
    meta = json.loads(META[shards.META])
    sums = meta.pop("crc32")
    meta = data.draw(changed(meta))
    sums[shards.META] = zlib.crc32(json.dumps(meta, sort_keys=True, separators=(",", ":")).encode())
    if isinstance(meta, dict):
        meta["crc32"] = data.draw(st.just(sums) | changed(sums))
    members = {**META, shards.META: json.dumps(meta).encode()}
    found = None
    with only_our_errors():
        found, _ = shards.decode_meta(members[shards.META])
    if found is not None:
        assert np.isfinite(np.array(found.landmarks)).all()
        assert np.array(found.pose.rotation).shape == (3, 3)
    tar = tar_of(*[(member(f"00000000.{name}"), content) for name, content in members.items()])
    manifest = json.loads(whole["manifest.json"])
    entry = {"name": TAR, "sha256": "0" * 64, "samples": 1}
    manifest = {**manifest, "tars": [entry], "frames": 1, "train": 1, "eval": 0}
    restore(folder, whole, **{TAR: tar, "manifest.json": json.dumps(manifest).encode()})
    read_all(folder)
    restore(folder, whole)


@given(JSON)
def test_any_json_as_metadata_is_refused(value: Any) -> None:
    with pytest.raises(ShardError):
        shards.decode_meta(json.dumps(value).encode())
    if isinstance(value, dict):
        with pytest.raises((ValueError, TypeError, KeyError, AttributeError, OverflowError)):
            FrameMeta.from_json(value)


@given(data=st.data(), name=st.sampled_from([shards.IMAGE, shards.ALPHA, shards.FACE]))
def test_a_damaged_picture_is_decoded_to_its_size_or_refused(data: st.DataObject, name: str) -> None:
    content = data.draw(damaged(META[name]))
    with only_our_errors():
        picture = shards.decode_picture(name, content, zlib.crc32(content), SIZE)
        assert picture.shape[:2] == (SIZE, SIZE)
        assert name != shards.FACE, "which is smaller"


def png_of(width: int, height: int) -> bytes:
    """A few bytes that unfold to any size."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    chunks = [(b"IHDR", head), (b"IDAT", body), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_a_picture_is_not_decoded_before_its_size_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    jpeg = bytearray(META[shards.IMAGE])
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 65_000, 65_000)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("the decoder was asked"))
    for name, content in ((shards.ALPHA, png_of(30_000, 30_000)), (shards.IMAGE, bytes(jpeg))):
        for side in (0, SIZE):
            with pytest.raises(ShardError, match=r"is (30000×30000|65000×65000)"):
                shards.decode_picture(name, content, zlib.crc32(content), side)


def test_pictures_of_another_size_than_the_manifest_says_are_refused(folder: Path, whole: dict[str, bytes]) -> None:
    manifest = {**json.loads(whole["manifest.json"]), "face_size": SIZE}
    restore(folder, whole, **{"manifest.json": json.dumps(manifest).encode()})
    with pytest.raises(ShardError, match=r"face\.jpg is 24×24, 48×48 was expected"):
        load(folder)
    restore(folder, whole)


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A few frames in the two containers that most videos have, and some with sound."""
    folder = tmp_path_factory.mktemp("films")
    paths = [
        write_video(folder / "a.mp4", counted_frames(6, 32, 32), options={"g": "3"}),
        write_video(folder / "a.webm", counted_frames(6, 32, 32), codec="libvpx", options={"b": "100k"}),
        write_with_sound(folder / "s.mp4", "libx264", "aac", pictures=3, seconds=1),
    ]
    return {path.name: path.read_bytes() for path in paths}


@settings(max_examples=150)
@given(data=st.data(), name=st.sampled_from(["a.mp4", "a.webm", "s.mp4"]))
def test_a_damaged_video_is_read_or_refused(
    films: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"damaged_{name}"
    path.write_bytes(data.draw(damaged(films[name])))
    index = None
    with only_our_errors():
        video.probe(path)
    with only_our_errors():
        require_whole(path)
    with only_our_errors():
        index = video.index_frames(path)
        assert index.fps <= 480
    with only_our_errors():
        assert sum(1 for _ in video.read_frames(path, 2, 6, index)) <= 4
    with only_our_errors():
        if has_audio(path):
            list(read_span(AudioSpan(path, 0.0, 1.0), audio_format(path)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nsecret.mp4\n#EXT-X-ENDLIST\n"),
        ("list.mp4", "ffconcat version 1.0\nfile secret.mp4\n"),
        ("list.mpd", "<?xml version='1.0'?><MPD><BaseURL>secret.mp4</BaseURL></MPD>"),
        ("list.sdp", "v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"),
    ],
)
def test_a_playlist_does_not_lead_to_other_files(
    films: dict[str, bytes], tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / "secret.mp4").write_bytes(films["a.mp4"])
    (tmp_path / name).write_text(content)
    with pytest.raises(VideoError, match="it is not a video"):
        open_video(tmp_path / name)


def test_a_name_is_a_file_and_no_address(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, films: dict[str, bytes]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.mp4").write_bytes(films["a.mp4"])
    for name in ("concat:secret.mp4", "file:secret.mp4", "http://127.0.0.1:1/a.mp4"):
        with pytest.raises(VideoError, match="no such file"):
            open_video(Path(name))
    Path("concat:secret.mp4").write_text("no video")
    with pytest.raises(VideoError, match="it is not a video"):
        open_video(Path("concat:secret.mp4"))


@pytest.mark.parametrize(
    ("times_ms", "reason"),
    [
        (list(range(30)), r"30 frames in 0\.029 s, at most 480 a second"),
        ([0, 40, 80, 5 * 3600 * 1000], r"4 frames over 18000 s"),
    ],
)  # fmt: skip
def test_rates_and_lengths_of_no_recording_are_refused(tmp_path: Path, times_ms: list[int], reason: str) -> None:
    frames = counted_frames(len(times_ms), 32, 32)
    path = write_video(tmp_path / "v.mp4", frames, times_ms=times_ms, options={"bf": "0"})
    for read in (require_whole, video.index_frames, lambda path: video.index_frames(path, len(times_ms))):
        with pytest.raises(VideoError, match=reason):
            read(path)


@pytest.fixture
def small_pictures_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A lower limit instead of pictures of gigabytes."""
    from lavatar.datasets import container

    def limit(pixels: int) -> None:
        monkeypatch.setattr(container, "MOST_PIXELS", pixels)
        monkeypatch.setitem(container._OPTIONS, "max_pixels", str(pixels))

    return limit


def test_pictures_that_are_too_large_are_refused_by_the_header_and_by_the_decoder(
    tmp_path: Path, films: dict[str, bytes], small_pictures_only: Callable[[int], None]
) -> None:
    path = tmp_path / "large.mp4"
    path.write_bytes(films["a.mp4"])
    small_pictures_only(32 * 31)
    for read in (video.probe, video.index_frames, require_whole):
        with pytest.raises(VideoError, match="its pictures are 32×32, at most 992 pixels"):
            read(path)
    content = films["a.mp4"].replace(struct.pack(">HH", 32, 32), struct.pack(">HH", 16, 16))
    assert content != films["a.mp4"]
    path.write_bytes(content)  # the header lies: what counts is what the decoder would make
    with pytest.raises(VideoError):
        video.index_frames(path)


def test_pictures_that_change_their_size_are_refused(tmp_path: Path) -> None:
    parts = [write_video(tmp_path / f"{s}.h264", counted_frames(4, s, 32), options={"g": "4"}) for s in (32, 64)]
    path = tmp_path / "both.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(VideoError, match="is 64×32, those before are 32×32"):
        list(video.read_frames(path))


def test_a_manifest_of_another_shape_is_still_ours(folder: Path, whole: dict[str, bytes]) -> None:
    """What the writer makes passes all of these checks."""
    restore(folder, whole)
    assert dataclasses.asdict(shards.verify(folder)) == json.loads(whole["manifest.json"])
