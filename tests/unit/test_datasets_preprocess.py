"""From a real video to shards, and everything that can be wrong with a video."""

from __future__ import annotations

import multiprocessing
import os
import resource
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from lavatar.configs.preprocess import PreprocessConfig
from lavatar.contracts import Event, NullSink, VideoSource
from lavatar.datasets import pose, shards, tracks
from lavatar.datasets.digest import dataset_digest
from lavatar.datasets.driver import track_driver
from lavatar.datasets.preprocess import preprocess, serial
from lavatar.datasets.salvage import remains, take_apart
from lavatar.datasets.weights import WEIGHTS
from lavatar.errors import FaceError, Interrupted, ShardError, StorageError, VideoError, WeightsError
from tests.unit.video_files import clip_of, write_video

SMALL = PreprocessConfig(
    portrait_size=128, matting_size=64, segment_frames=15, warmup_frames=3, min_frames=20, face_size=64
)
COUNT = 36


@pytest.fixture(scope="module")
def faces(videos: Path, weights: Path) -> list[np.ndarray]:
    """Frames of a real video, 256²."""
    return [cv2.resize(f, (256, 256), interpolation=cv2.INTER_AREA) for f in clip_of(videos / "newsreader.mp4", COUNT)]


@pytest.fixture(scope="module")
def clip(faces: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "good.mp4", faces)


def run(path: Path, out: Path, config: PreprocessConfig = SMALL, **kwargs: object) -> shards.Manifest:
    options = {"parallel": serial, "events": NullSink(), "stage": "test", **kwargs}
    return preprocess(VideoSource("someone", path=path), config, out, **options)  # type: ignore[arg-type]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def tiled(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.hstack([left[:, 40:216], right[:, 40:216]]))


def test_a_clip_becomes_a_dataset(clip: Path, tmp_path: Path) -> None:
    events: list[Event] = []

    class Sink(NullSink):
        def emit(self, event: Event) -> None:
            events.append(event)

    manifest = run(clip, tmp_path / "d", events=Sink())
    assert (manifest.frames, manifest.train, manifest.eval, manifest.dropped) == (COUNT, 32, 4, [])
    assert [t["samples"] for t in manifest.tars] == [15, 15, 6]
    assert manifest.reprojection_px < 0.6 * 128 / 512 * 2
    assert shards.verify(tmp_path / "d") == manifest
    samples = list(shards.iterate(tmp_path / "d"))
    assert [s.meta.frame for s in samples] == list(range(COUNT))
    assert [s.meta.split for s in samples] == ["train"] * 32 + ["eval"] * 4
    sample = samples[10]
    assert sample.image.shape == (128, 128, 3)
    assert sample.face.shape == (64, 64, 3)
    assert sample.meta.expression.keys() >= {"jaw", "blink", "smile", "pucker", "brows", "gaze", "mp.jawOpen"}
    nose = np.array(sample.meta.landmarks)[30]
    assert sample.alpha[int(nose[1]), int(nose[0])] == 255
    assert sample.alpha[:6, :6].max() == 0  # wall
    assert sample.alpha[-1].max() < 80  # the neck is faded out
    tip = pose.project(pose.canonical_face()[[4]], sample.meta.pose, sample.meta.camera)[0]
    assert np.linalg.norm(tip - nose) < 3
    progress = [e for e in events if e.total]
    assert progress[-1].done == progress[-1].total == COUNT


def test_bytes_do_not_depend_on_the_workers(clip: Path, tmp_path: Path) -> None:
    run(clip, tmp_path / "serial")
    for workers in (1, 3):
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            run(clip, tmp_path / str(workers), parallel=pool.map)
        assert bytes_of(tmp_path / "serial") == bytes_of(tmp_path / str(workers))


def test_a_finished_dataset_is_not_made_again(clip: Path, tmp_path: Path) -> None:
    first = run(clip, tmp_path / "d")

    def never(function: object, items: object) -> list[object]:
        raise AssertionError("work was done again")

    assert run(clip, tmp_path / "d", parallel=never) == first


def test_an_interrupted_attempt_is_taken_up(clip: Path, tmp_path: Path) -> None:
    """Ctrl-C after the first segment: it stays, a damaged one does not count, and the bytes are the same in the end."""

    class Stop(NullSink):
        def emit(self, event: Event) -> None:
            if event.text.startswith("matting") and event.done == 30:
                raise Interrupted("Ctrl-C")

    with pytest.raises(Interrupted):
        run(clip, tmp_path / "d", events=Stop())
    work = tmp_path / "d" / ".work"
    assert sorted(p.name for p in work.glob("*.tar")) == ["00000.tar", "00001.tar"]
    assert not (tmp_path / "d" / "manifest.json").exists()
    second = work / "00001.tar"
    second.write_bytes(second.read_bytes()[:-512] + b"x" * 512)
    kept = (work / "00000.tar").stat().st_ino
    run(clip, tmp_path / "d")
    assert (tmp_path / "d" / "00000.tar").stat().st_ino == kept
    run(clip, tmp_path / "fresh")
    assert bytes_of(tmp_path / "d") == bytes_of(tmp_path / "fresh")


def test_of_a_damaged_dataset_only_the_damaged_segment_is_made_again(clip: Path, tmp_path: Path) -> None:
    run(clip, tmp_path / "d")
    whole = bytes_of(tmp_path / "d")
    nodes = {name: (tmp_path / "d" / name).stat().st_ino for name in whole}
    damaged = bytearray(whole["00001.tar"])
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "d" / "00001.tar").write_bytes(damaged)
    assert take_apart(tmp_path / "d") == 2
    assert remains(tmp_path / "d").useless == ()
    with pytest.raises(ShardError, match="is no dataset"):
        shards.verify(tmp_path / "d")
    run(clip, tmp_path / "d")
    assert bytes_of(tmp_path / "d") == whole
    made = {name for name in whole if (tmp_path / "d" / name).stat().st_ino != nodes[name]}
    assert made <= {"00001.tar", "manifest.json"}


def test_digest_depends_on_bytes_and_configuration_not_on_the_name(clip: Path, tmp_path: Path) -> None:
    digest = dataset_digest(VideoSource("a", path=clip), SMALL)
    other = tmp_path / "elsewhere.mp4"
    other.write_bytes(clip.read_bytes())
    assert dataset_digest(VideoSource("b", path=other), SMALL) == digest
    assert dataset_digest(VideoSource("a", path=clip), SMALL.model_copy(update={"smoothing": 2.0})) != digest
    other.write_bytes(clip.read_bytes() + b"\0")
    assert dataset_digest(VideoSource("b", path=other), SMALL) != digest
    assert len({dataset_digest(VideoSource("s", synthetic_seed=i), SMALL) for i in range(3)}) == 3


@pytest.mark.parametrize(
    ("setting", "used"),
    [
        ({"tracker": "face_alignment"}, ("fan_2d", "s3fd", "rvm")),
        ({"matting": "mediapipe"}, ("face_landmarker", "selfie_segmenter")),
    ],
)
def test_digest_depends_on_the_weights_that_are_used(
    clip: Path, setting: dict[str, str], used: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, config = VideoSource("a", path=clip), SMALL.model_copy(update=setting)
    digest = dataset_digest(source, config)
    assert set(used) <= WEIGHTS.keys()
    for name, weight in dict(WEIGHTS).items():
        with monkeypatch.context() as patch:
            patch.setitem(WEIGHTS, name, replace(weight, sha256="0" * 64))
            assert (dataset_digest(source, config) != digest) == (name in used), name


def test_a_driver_clip_is_what_the_dataset_holds(clip: Path, tmp_path: Path) -> None:
    run(clip, tmp_path / "d")
    driver = track_driver(clip, SMALL)
    samples = list(shards.iterate(tmp_path / "d"))
    assert driver.faces_NHW3.shape == (COUNT, 64, 64, 3)
    assert [s.meta.pose for s in samples] == driver.poses
    assert np.abs(driver.faces_NHW3[5].astype(int) - samples[5].face).mean() < 3
    assert driver.expressions["jaw"][7] == samples[7].meta.expression["jaw"]
    assert driver.times[10] == pytest.approx(0.4)


def test_no_face(tmp_path: Path, weights: Path) -> None:
    rng = np.random.default_rng(1)
    wall = [cv2.resize(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8), (160, 128)) for _ in range(25)]
    path = write_video(tmp_path / "wall.mp4", wall)
    with pytest.raises(FaceError, match=r"wall\.mp4: no face was found in any of 25 frames"):
        run(path, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_two_people(faces: list[np.ndarray], tmp_path: Path) -> None:
    path = write_video(tmp_path / "pair.mp4", [tiled(f, faces[(i + 9) % COUNT]) for i, f in enumerate(faces)])
    with pytest.raises(FaceError, match=r"several faces of comparable size in \d+ of 36 frames: 0"):
        run(path, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_a_second_face_in_a_few_frames_drops_these(faces: list[np.ndarray], tmp_path: Path) -> None:
    empty = np.full_like(faces[0], 90)
    frames = [tiled(f, faces[0] if i in (20, 21) else empty) for i, f in enumerate(faces)]
    manifest = run(write_video(tmp_path / "visit.mp4", frames), tmp_path / "d")
    assert manifest.dropped == [{"frame": i, "reason": tracks.TWO_FACES} for i in (20, 21)]
    assert manifest.frames == COUNT - 2


def test_a_small_face_in_the_background_is_no_second_person(faces: list[np.ndarray], tmp_path: Path) -> None:
    frames = [f.copy() for f in faces]
    for frame, other in zip(frames, reversed(faces), strict=True):
        frame[4:68, 4:68] = cv2.resize(other, (64, 64), interpolation=cv2.INTER_AREA)
    manifest = run(write_video(tmp_path / "poster.mp4", frames), tmp_path / "d")
    assert manifest.dropped == []
    first = next(shards.iterate(tmp_path / "d")).meta
    assert first.portrait_transform[0][0] < 1  # the large face, not the small one, fills the crop


def test_a_face_lost_for_a_while_is_counted_and_named(faces: list[np.ndarray], tmp_path: Path) -> None:
    frames = [np.zeros_like(f) if i in (3, 12, 13, 14) else f for i, f in enumerate(faces)]
    manifest = run(write_video(tmp_path / "gaps.mp4", frames), tmp_path / "d")
    assert manifest.dropped == [{"frame": i, "reason": tracks.NO_FACE} for i in (3, 12, 13, 14)]
    assert [s.meta.frame for s in shards.iterate(tmp_path / "d")] == [
        i for i in range(COUNT) if i not in (3, 12, 13, 14)
    ]


def test_a_face_lost_for_too_long(faces: list[np.ndarray], tmp_path: Path) -> None:
    frames = [np.zeros_like(f) if 5 <= i < 17 else f for i, f in enumerate(faces)]
    path = write_video(tmp_path / "away.mp4", frames)
    with pytest.raises(FaceError, match=r"12 of 36 frames cannot be used .*no face: 12; frames 5-16") as caught:
        run(path, tmp_path / "d")
    assert "max_dropped" in caught.value.hint
    assert not (tmp_path / "d").exists()
    loose = SMALL.model_copy(update={"max_dropped": 0.5})
    assert run(path, tmp_path / "d", loose).frames == COUNT - 12


def test_too_short(faces: list[np.ndarray], tmp_path: Path) -> None:
    path = write_video(tmp_path / "short.mp4", faces[:12])
    with pytest.raises(VideoError, match=r"short\.mp4: 12 frames, at least 20 are needed"):
        run(path, tmp_path / "d")


@pytest.mark.parametrize("content", [b"", b"a letter, not a film\n" * 99])
def test_no_video_at_all(content: bytes, tmp_path: Path, weights: Path) -> None:
    path = tmp_path / "letter.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"letter\.mp4"):
        run(path, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_truncated(clip: Path, tmp_path: Path, weights: Path) -> None:
    path = tmp_path / "half.mp4"
    path.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    with pytest.raises(VideoError, match=r"half\.mp4"):
        run(path, tmp_path / "d")


def test_a_turned_phone_video_gives_upright_heads(faces: list[np.ndarray], clip: Path, tmp_path: Path) -> None:
    stored = [np.rot90(f) for f in faces[:24]]
    path = write_video(tmp_path / "phone.mp4", stored, rotation=-90)
    turned, straight = track_driver(path, SMALL), track_driver(clip, SMALL)
    assert pose.angles(turned.poses[9])[2] == pytest.approx(pose.angles(straight.poses[9])[2], abs=2.0)


def test_missing_weights_stop_before_the_work(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVATAR_WEIGHTS", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(WeightsError, match="rvm_mobilenetv3_fp32") as caught:
        run(clip, tmp_path / "d")
    assert "lavatar weights fetch" in caught.value.hint
    assert not (tmp_path / "d").exists()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_limit_on_files_leaves_nothing(clip: Path, tmp_path: Path) -> None:
    """As on a full disk, for every user: no file of this process may grow past 16 KiB, the kernel refuses to write."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, old[1]))
    try:
        with pytest.raises(StorageError, match="File too large") as caught:
            run(clip, tmp_path / "d")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "space" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_disk_full_leaves_nothing(clip: Path, tiny_disk: Path) -> None:
    keep = tiny_disk / "other"
    keep.write_text("untouched")
    with pytest.raises(StorageError, match="the disk is full") as caught:
        run(clip, tiny_disk / "d")
    assert "space" in caught.value.hint
    assert [p.name for p in tiny_disk.rglob("*")] == ["other"]
