"""Trackers: landmarks and measures on real frames, and the tables behind them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from lavatar.contracts import EXPRESSIONS, FrameMeta
from lavatar.datasets import tracking
from lavatar.datasets import weights as weights_room
from lavatar.datasets.digest import tracker_weights
from lavatar.datasets.meter import MediapipeMeter, noise_of
from lavatar.errors import ConfigError, WeightsError
from tests.unit.video_files import clip_of


@pytest.fixture(scope="module")
def frames(videos: Path, weights: Path) -> list[np.ndarray]:
    """Eight different faces of one woman: gaze to both sides, mouth open and shut."""
    clip = clip_of(videos / "grimaces.mp4", 400)
    return clip[::50]


@pytest.fixture(scope="module")
def tracked(frames: list[np.ndarray]) -> list[tracking.Track]:
    tracker = tracking.open_tracker("mediapipe", mode="image")
    found = [tracker.track(frame, 0.0) for frame in frames]
    tracker.close()
    assert all(track is not None for track in found)
    return [track for track in found if track is not None]


def test_the_68_lie_where_the_scheme_says(tracked: list[tracking.Track]) -> None:
    for track in tracked:
        p = track.landmarks68
        assert p[0, 0] < p[36, 0] < p[39, 0] < p[27, 0] < p[42, 0] < p[45, 0] < p[16, 0]  # left to right in the image
        assert p[19, 1] < p[37, 1] < p[41, 1] < p[33, 1] < p[51, 1] < p[57, 1] < p[8, 1]  # down the face
        assert p[48, 0] < p[54, 0]
        assert p[62, 1] <= p[66, 1]
        assert np.all(np.diff(p[27:31, 1]) > 0)
        assert track.faces == 1
        for iris, eye in zip(track.irises, (p[36:42], p[42:48]), strict=True):
            assert (eye.min(0) < iris).all()
            assert (iris < eye.max(0)).all()
    assert len(set(tracking.LANDMARKS_68)) == 68


def test_measures_follow_the_face(tracked: list[tracking.Track]) -> None:
    for track in tracked:
        assert set(EXPRESSIONS) <= track.expression.keys()
        assert sum(name.startswith("mp.") for name in track.expression) == 51  # 52 with the neutral one
    jaw = [track.expression["jaw"] for track in tracked]
    gap = [np.linalg.norm(track.landmarks68[62] - track.landmarks68[66]) for track in tracked]
    assert np.corrcoef(jaw, gap)[0, 1] > 0.8


def test_gaze_is_positive_to_the_image_right(frames: list[np.ndarray], tracked: list[tracking.Track]) -> None:
    tracker = tracking.open_tracker("mediapipe", mode="image")
    mirrored = [tracker.track(np.ascontiguousarray(frame[:, ::-1]), 0.0) for frame in frames]
    gaze = [track.expression["gaze"] for track in tracked]
    assert np.corrcoef(gaze, [track.expression["gaze"] for track in mirrored if track])[0, 1] < -0.8
    irises = []
    for track in tracked:
        p = track.landmarks478[:, 0]
        irises.append((p[468] - p[33]) / (p[133] - p[33]) + (p[473] - p[362]) / (p[263] - p[362]))
    assert np.corrcoef(gaze, irises)[0, 1] > 0.8


def test_expression_measures_by_hand() -> None:
    raw = {"jawOpen": 0.5, "eyeBlinkLeft": 1.0, "mouthSmileRight": 0.4, "mouthPucker": 0.2, "browInnerUp": 0.9,
           "browDownLeft": 0.2, "eyeLookOutLeft": 0.6, "eyeLookInRight": 0.4, "_neutral": 1.0}  # fmt: skip
    got = tracking.expression_measures(raw)
    assert {name: round(got[name], 6) for name in EXPRESSIONS} == {
        "jaw": 0.5, "blink": 0.5, "smile": 0.2, "pucker": 0.2, "brows": 0.2, "gaze": 0.5,
    }  # fmt: skip
    assert "mp._neutral" not in got


def test_geometric_measures_from_points_alone(tracked: list[tracking.Track]) -> None:
    """What face_alignment's 68 points give agrees in direction with the coefficients."""
    jaw = [tracking.geometric_measures(track.landmarks68)["jaw"] for track in tracked]
    assert np.corrcoef(jaw, [track.expression["jaw"] for track in tracked])[0, 1] > 0.7


def test_face_alignment_tracker_takes_the_largest_face(tracked: list[tracking.Track]) -> None:
    """The network is a stand-in: its weights cannot be downloaded on a closed machine."""
    large = tracked[0].landmarks68
    small = large * 0.2

    class Network:
        def get_landmarks_from_image(self, rgb: np.ndarray, **_: object) -> object:
            boxes = [np.array([0, 0, 20, 20, 0.9]), np.array([0, 0, 200, 220, 0.9])]
            return [small, large], [np.full(68, 0.5), np.full(68, 0.8)], boxes

    class Nothing:
        def get_landmarks_from_image(self, rgb: np.ndarray, **_: object) -> object:
            return None

    picture = np.zeros((64, 64, 3), np.uint8)
    track = tracking.FaceAlignmentTracker(network=Network()).track(picture, 0.0)
    assert track is not None
    assert np.array_equal(track.landmarks68, large)
    assert (track.faces, round(track.score, 3), track.landmarks478) == (1, 0.8, None)
    assert tracking.FaceAlignmentTracker(network=Nothing()).track(picture, 0.0) is None


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """face-alignment's two networks as files of the official names, with random weights in place of the trained."""
    from face_alignment.detection.sfd.net_s3fd import s3fd
    from face_alignment.models import FAN

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    for name, network in (("fan_2d", FAN(4)), ("s3fd", s3fd())):
        torch.save(network.state_dict(), folder / weights_room.WEIGHTS[name].file)
    return folder


@pytest.fixture
def known_stand_ins(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-ins in LAVATAR_WEIGHTS and in the table; no network, and a home in which nothing may appear."""
    monkeypatch.setenv("LAVATAR_WEIGHTS", str(stand_ins))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("fan_2d", "s3fd"):
        weight = weights_room.WEIGHTS[name]
        digest = weights_room.file_sha256(stand_ins / weight.file)
        monkeypatch.setitem(weights_room.WEIGHTS, name, replace(weight, sha256=digest))
    return stand_ins


def test_face_alignment_tracker_uses_the_files_of_the_table(
    known_stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package and its networks are real; the weights are random, as the trained cannot be had here."""

    def no_download(*_: object, **__: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr("urllib.request.urlopen", no_download)
    tracker = tracking.open_tracker("face_alignment")
    network = tracker._network  # type: ignore[attr-defined]
    for name, loaded in (("fan_2d", network.face_alignment_net), ("s3fd", network.face_detector.face_detector)):
        saved = torch.load(known_stand_ins / weights_room.WEIGHTS[name].file, weights_only=True)
        assert all(torch.equal(saved[key], value) for key, value in loaded.state_dict().items())
        assert not loaded.training
    box = np.array([40.0, 40.0, 200.0, 220.0, 0.9])
    monkeypatch.setattr(network.face_detector, "detect_from_image", lambda image: [box])  # random: finds nothing itself
    picture = np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)
    track = tracker.track(picture, 0.0)
    assert track is not None
    assert track.landmarks68.shape == (68, 2)
    assert set(EXPRESSIONS) - track.expression.keys() == {"gaze"}
    assert list(tmp_path.iterdir()) == []  # nothing was written to the home or to torch's cache


def test_face_alignment_tracker_without_its_files_or_with_others(known_stand_ins: Path, tmp_path: Path) -> None:
    missing = tmp_path / "one"
    missing.mkdir()
    for name in ("fan_2d", "s3fd"):
        assert name in tracker_weights("face_alignment")
        weight = weights_room.WEIGHTS[name]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(weights_room.WEIGHTS, name, replace(weight, sha256="0" * 64))
            with pytest.raises(WeightsError, match=f"{weight.file}: wrong SHA-256"):
                tracking.open_tracker("face_alignment")
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(weights_room.WEIGHTS, name, replace(weight, file="gone"))
            with pytest.raises(WeightsError, match="weights gone are not in") as caught:
                tracking.open_tracker("face_alignment")
            assert f"lavatar weights fetch {name}" in caught.value.hint


@pytest.mark.parametrize("name", ["fan_2d", "s3fd"])
def test_face_alignment_files_run_no_code(
    known_stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.mkdir, (str(tmp_path / "never"),))

    evil = tmp_path / "evil.pth"
    torch.save({"conv1.weight": Evil()}, evil)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache" / "lavatar").mkdir(parents=True)
    (tmp_path / "cache" / "lavatar" / "weights").symlink_to(tmp_path)
    change = {"file": "evil.pth", "sha256": weights_room.file_sha256(evil)}
    monkeypatch.setitem(weights_room.WEIGHTS, name, replace(weights_room.WEIGHTS[name], **change))
    with pytest.raises(WeightsError, match="not a network of face-alignment's"):
        tracking.open_tracker("face_alignment")
    assert not (tmp_path / "never").exists()


def test_official_names_carry_the_start_of_the_digest() -> None:
    """torch.hub's convention, by which the package itself would check them."""
    from torch.hub import HASH_REGEX

    for name in tracker_weights("face_alignment"):
        weight = weights_room.WEIGHTS[name]
        start = HASH_REGEX.search(weight.file)
        assert start is not None
        assert weight.sha256.startswith(start.group(1))
        assert weight.url.endswith("/" + weight.file)
        assert (len(weight.sha256), len(start.group(1))) == (64, 10)


def test_official_addresses_are_the_packages() -> None:
    from face_alignment import api
    from face_alignment.detection.sfd import sfd_detector

    assert weights_room.WEIGHTS["fan_2d"].url == api.models_urls["2DFAN-4"]
    assert weights_room.WEIGHTS["s3fd"].url == sfd_detector.models_urls["s3fd"]


def test_unknown_tracker_and_missing_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no tracker 'eyes'"):
        tracking.open_tracker("eyes")
    monkeypatch.setenv("LAVATAR_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(WeightsError, match=r"face_landmarker\.task"):
        tracking.open_tracker("mediapipe")


def test_padded_rows_do_not_confuse_the_tracker(frames: list[np.ndarray], tracked: list[tracking.Track]) -> None:
    """A view into a wider array has padded rows; MediaPipe would read it skewed."""
    wide = np.zeros((frames[0].shape[0], frames[0].shape[1] + 7, 3), np.uint8)
    wide[:, :-7] = frames[0]
    tracker = tracking.open_tracker("mediapipe", mode="image")
    track = tracker.track(wide[:, :-7], 0.0)
    assert track is not None
    assert np.allclose(track.landmarks68, tracked[0].landmarks68)


def test_meter_works_on_small_portraits_before_white(frames: list[np.ndarray], tracked: list[tracking.Track]) -> None:
    meter = MediapipeMeter()
    small = np.stack([cv2.resize(frame, (128, 128), interpolation=cv2.INTER_AREA) for frame in frames])
    metas: list[FrameMeta] | None = None
    got = meter.measure(small, metas)
    assert list(got) == list(EXPRESSIONS)
    assert np.isfinite(got["jaw"]).all()
    for name in ("jaw", "gaze"):
        assert np.corrcoef(got[name], [track.expression[name] for track in tracked])[0, 1] > 0.9
    sight = meter.look(small)
    assert all(np.array_equal(sight.measures[name], got[name]) for name in EXPRESSIONS)
    for found, track, frame in zip(sight.landmarks_B68x2, tracked, frames, strict=True):
        truth = track.landmarks68 / frame.shape[1::-1]
        between = np.linalg.norm(truth[36] - truth[45])
        assert np.linalg.norm(found - truth, axis=1).mean() < 0.03 * between  # seen at a quarter of the size
    assert np.isnan(meter.look(np.full((1, 128, 128, 3), 255, np.uint8)).landmarks_B68x2).all()
    blank = meter.measure(np.full((1, 128, 128, 3), 255, np.uint8))
    assert all(np.isnan(values).all() for values in blank.values())


class _Brightness:
    """A meter whose jaw is the picture's mean, whose smile is a constant, and which does not know the rest."""

    note = ""

    def measure(self, images_BHW3: np.ndarray, metas: object = None) -> dict[str, np.ndarray]:
        count = len(images_BHW3)
        return {"jaw": images_BHW3.mean(axis=(1, 2, 3)), "smile": np.ones(count), "gaze": np.full(count, np.nan)}


def test_noise_is_what_differs_between_copies_of_one_picture() -> None:
    ramp = np.tile(np.linspace(0, 250, 32)[None, :, None], (32, 1, 3)).astype(np.uint8)
    still = np.full((32, 32, 3), 100, np.uint8)
    noise = noise_of(_Brightness(), np.stack([ramp] * 3), [])
    assert 0.5 < noise["jaw"] < 3, "a slope of 8 levels a pixel, moved by up to half a pixel"
    assert noise_of(_Brightness(), still[None], [])["jaw"] < 0.5
    assert (noise["smile"], noise["gaze"], noise["blink"]) == (0.0, 0.0, 0.0)
    assert noise == noise_of(_Brightness(), np.stack([ramp] * 3), []), "the same whenever it is asked"
